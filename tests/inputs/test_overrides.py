"""Overrides that end in one sentence, and odd ones that are taken literally."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune.recipe.file import load_recipe
from finetune.train import main
from tests.builders.inputs import Refused, check_refused
from tests.builders.recipes import SMALL, write

LONG = "x" * 120_000


def override(text: str, *says: str) -> Refused:
    """A right recipe with an override."""

    def arrange(folder: Path) -> Sequence[object]:
        return write(folder, SMALL), "--dry-run", text

    return Refused(text[:60], arrange, says)


def mistake(text: str, *says: str) -> Refused:
    """A right recipe with an override after which it has a mistake there."""
    return override(text, f"has a mistake: {text.partition('=')[0]}: ", *says)


QUOTES = "is not valid YAML (", "must be in quotes"
NOT_TEXT = "which YAML does not read as text; put the text in quotes"

CASES = (
    override("steps", "An override must be key=value (got 'steps')"),
    override("=3", "An override must be key=value (got '=3')"),
    override(LONG, "An override must be key=value (got 'xxx", "(120,000 letters)"),
    override("seed.deep=3", "has a mistake: seed: must be a whole number (got {'deep': 3})"),
    override("stage_1.steps.deep=3", "takes the value 'steps' for a section"),
    override(f"{'a.' * 3000}a=3", "sets an unknown key", "(6,003 letters)"),
    override("seed=[1", "The value of the override 'seed=[1'", *QUOTES),
    override("seed=" + "[" * 5000, "more than 40 lists and sections", "(5,005 letters)"),
    override("seed=!!int abc", "'abc' is no int", *QUOTES),
    override("seed=!!python/name:os.system ''", "of no type used here", *QUOTES),
    override("seed=" + "1" * 5000, "a number of 5,000 digits, more than 40"),
    override("seed=\a", "the character U+0007 is not allowed"),
    override("seed=\udcff", "the character U+DCFF is not allowed"),
    override("seed=5 #3", "contains '#3'", NOT_TEXT),
    override("seed=&x 3", "contains '&x'", NOT_TEXT),
    override("seed=*x", "found undefined alias 'x'", *QUOTES),
    override("seed=--- 3", "contains '---'", NOT_TEXT),
    override("validation.prompts=[a dog #3, b]", *QUOTES),
    override("validation.prompts=[&dog a]", "contains '&dog'", NOT_TEXT),
    override("validation.prompts=[a] b", "validation.prompts=[a] b", *QUOTES),
    override("stage_1.adapter.targets=!to_q x", "the tag '!to_q' is of no type", *QUOTES),
    override("stage_1.adapter.targets=*.to_q", *QUOTES),
    mistake("seed=1e3", "must be a whole number (got 1000.0)"),
    mistake("seed=", "must be a whole number (got null)"),
    mistake("seed=0.5", "must be a whole number (got 0.5)"),
    mistake("seed=5,", "must be a whole number (got '5,')"),
    mistake(f"seed={10**30}", "must be below 9,223,372,036,854,775,808"),
    mistake("stage_1.steps=1e3", "must be a whole number (got 1000.0)"),
    mistake(f"stage_1.batch_size={10**9}", "must be at most 10,000 (got 1000000000)"),
    mistake(f"stage_1.adapter.rank={10**9}", "must be at most 65,536"),
    mistake("stage_1.optimizer.learning_rate=1e-4.", "must be a number (got '1e-4.')"),
    mistake("stage_1.compile=1", "must be true or false (got 1)"),
    mistake("data.horizontal_flip=yes", "must be true or false (got 'yes')"),
    mistake("text.precision=fp99", "(got 'fp99'); did you mean"),
    mistake("trackers=wandb", "must be a list (got 'wandb')"),
    mistake("validation.prompts={a: b}", "must be a list (got {'a': 'b'})"),
    mistake("data.prompt=", "is empty; write some text"),
    mistake("data.prompt=\u200b", "has no visible character (found ZERO WIDTH SPACE)"),
    mistake("data.prompt=a\udcff", r"has a byte that is not UTF-8 (in 'a\udcff')"),
    mistake("data.prompt=a\0", r"has a NUL character (in 'a\x00')"),
    mistake(f"data.prompt={LONG}", "has 120,000 letters, more than 10,000; shorten it"),
    mistake("name=a b", "must be of the form", "(got 'a b')"),
    mistake("name=a\udcff", "must be a text in UTF-8"),
    mistake("runs_dir=~nobody_of_this_name/x", "names no user's home folder"),
    mistake("base.stage_1=", "is empty; write some text"),
    mistake("stpes=3", "unknown key; did you mean"),
    mistake("stage_1.stpes=3", "unknown key; did you mean steps?"),
    override(" seed=3", "has a mistake: ' seed': unknown key; did you mean seed?"),
    override("a\nb=3", r"has a mistake: 'a\nb': unknown key"),
    override("a\udcff=3", r"must be a text in UTF-8 (got 'a\udcff')"),
    override(f"{LONG}=3", "has a mistake: 'xxx", "(120,000 letters): unknown key"),
    override("stage_1.=3", "stage_1.: unknown key"),
    override("stage_1=null", "stage_1: nothing to train"),
    override("evaluation={subject: dog, identifier: dog}", "evaluation.prompts: must be given"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case.name))
def test_an_override_is_refused(
    case: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, main, tmp_path, capsys)


@pytest.mark.parametrize(
    ("texts", "path", "value"),
    [
        (["data.prompt=a photo of sks dog #3"], "data.prompt", "a photo of sks dog #3"),
        (["data.prompt=&dog"], "data.prompt", "&dog"),
        (["data.prompt=a=b=c"], "data.prompt", "a=b=c"),
        (["data.prompt='a'"], "data.prompt", "'a'"),
        (["data.prompt= a "], "data.prompt", " a "),
        (["data.prompt=a\nb"], "data.prompt", "a\nb"),
        (["data.prompt=null"], "data.prompt", None),
        (["data.prompt=~"], "data.prompt", "~"),
        (["data.prompt=$HOME"], "data.prompt", "$HOME"),
        (["data.source=[a]"], "data.source", "[a]"),
        (["data.source=a::b"], "data.source", "a::b"),
        (["data.source=~/my dog"], "data.source", "~/my dog"),
        (["base.revision=12e4567"], "base.revision", "12e4567"),
        (["base.revision=0100"], "base.revision", "0100"),
        (["stage_1.steps=0100"], "stage_1.steps", 100),
        (["stage_1.steps= 7 "], "stage_1.steps", 7),
        (["stage_1.steps=7", "stage_1.steps=8"], "stage_1.steps", 8),
        (["stage_1={steps: 9}"], "stage_1.steps", 9),
        (["stage_1.optimizer.betas=[0.9, 0]"], "stage_1.optimizer.betas", (0.9, 0.0)),
        (["stage_1.adapter.targets=[to_q, to_k]"], "stage_1.adapter.targets", ("to_q", "to_k")),
        (["stage_1.adapter.targets='*.to_q'"], "stage_1.adapter.targets", "*.to_q"),
        (["stage_1.ema_decay=null"], "stage_1.ema_decay", None),
        (["validation.prompts=[12:30, yes, '#3']"], "validation.prompts", ("12:30", "yes", "#3")),
    ],
    ids=lambda each: ascii(each)[:40],
)
def test_an_override_is_taken_literally(
    texts: list[str], path: str, value: object, tmp_path: Path
) -> None:
    node: object = load_recipe(write(tmp_path, SMALL), texts)
    for part in path.split("."):
        node = vars(node)[part]
    assert node == value
    assert type(node) is type(value)
