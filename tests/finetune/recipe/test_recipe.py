"""Recipes: strict, and every mistake reported at once."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from adapters.errors import UserError
from finetune.recipe.file import MistakesError, _options, check_section, load_recipe
from finetune.recipe.schema import OutputPrior, PicturePrior, Recipe, Section
from finetune.recipe.yaml12 import Loader
from tests.builders import ROOT
from tests.builders.recipes import SMALL, write

HEAVY = {"torch", "diffusers", "transformers", "peft", "bitsandbytes", "datasets", "accelerate"}
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_say_how_to_run(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    header = path.read_text().split("name:")[0]
    assert f"recipes/{path.name}" in header
    for measured in ("Memory", "Time"):
        assert re.search(rf"^# {measured}: +[0-9]", header, re.MULTILINE), measured


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    """Mistakes, and the resolved recipe, are shown within a second or two."""
    code = (
        "import sys; from finetune.recipe.file import load_recipe\n"
        f"load_recipe({str(RECIPES[-1])!r}, ['stage_1.steps=3']).to_yaml()\n"
        f"print(*{HEAVY!r} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("\n", "")


def test_the_shipped_set() -> None:
    stages = "dreambooth_stage_1 dreambooth_stage_2 dreambooth_cascade captions_stage_1"
    assert {*stages.split(), "captions_stage_2", "quickstart"} <= {path.stem for path in RECIPES}


def test_resolving_is_idempotent(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES[-1], ["data.prompt=a 猫 🐙"])
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert "prompt: a 猫 🐙\n" in recipe.to_yaml()


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    recipe = load_recipe(path, ["stage_1.steps=7", "stage_1.adapter.targets=[to_q]", "seed=3"])
    assert recipe.stage_1 is not None
    assert (recipe.stage_1.steps, recipe.stage_1.adapter.targets) == (7, ("to_q",))
    assert recipe.seed == 3


def test_an_override_changes_one_use_of_a_yaml_alias(tmp_path: Path) -> None:
    shared = "prior: {prompts: [a], sampling: &s {stage_1: {steps: 3}}}\nvalidation: {sampling: *s}"
    recipe = load_recipe(write(tmp_path, SMALL + shared), ["prior.sampling.stage_1.steps=9"])
    assert recipe.prior is not None
    assert recipe.prior.sampling.stage_1.steps == 9
    assert recipe.validation.sampling.stage_1.steps == 3


def mistakes(folder: Path, text: str) -> dict[str, str]:
    """The message of every mistake of a recipe, by path."""
    with pytest.raises(UserError) as error:
        load_recipe(write(folder, text))
    assert isinstance(error.value, MistakesError)
    rows = error.value.rows
    title = "a mistake: " if len(rows) == 1 else f"{len(rows)} mistakes:\n"
    assert title in str(error.value)
    found = dict(row.strip().split(": ", 1) for row in rows)
    assert len(found) == len(rows)
    return found


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    found = mistakes(
        tmp_path,
        """
name: small
base: {stage_1: one}
data: {source: pictures, caption_dropout: 1.5, promt: a dog, prompt: ""}
prior: {prompts: [a dog]}
seed: -1
sed: 3
stage_1:
  steps: many
  noise_level: [0, 9]
  timesteps: {low: 9, high: 3, density: beta, shape: [1, 0]}
  optimizer: {name: adamw8bit, schedule: bar, learning_rat: 3, betas: [0.9, 1.0]}
  adapter: {rnak: 4, targets: 3}
stage_2:
  steps: 5
  batch_size: 1
  noise_level: [9, 3]
  timesteps: {density: uniform, shape: [1, 1], hihg: 3}
  adapter: {kind: lokr, targets: [to_q, 4]}
  optimizer: {lora_plus_ratio: 4}
""",
    )
    expected = {
        "data.caption_dropout": "must be at most 1 (got 1.5)",
        "data.promt": "unknown key; did you mean prompt?",
        "data.prompt": "is empty; write some text",
        "seed": "must be at least 0 (got -1)",
        "sed": "unknown key; did you mean seed?",
        "stage_1.steps": "must be a whole number (got 'many')",
        "stage_1.timesteps.high": "must be at least low, 9 (got 3)",
        "stage_1.timesteps.shape": "b must be greater than 0 and at most 1e+06 (got 0.0)",
        "stage_1.noise_level": "is for stage_2 alone",
        "stage_1.optimizer.name": "unknown name 'adamw8bit'; did you mean adamw_8bit?",
        "stage_1.optimizer.schedule": "unknown name 'bar'; valid: constant, cosine",
        "stage_1.optimizer.learning_rat": "unknown key; did you mean learning_rate?",
        "stage_1.optimizer.betas.1": "must be below 1 (got 1.0)",
        "stage_1.adapter.rnak": "unknown key; did you mean rank?",
        "stage_1.adapter.targets": "must be a text or a list (got 3)",
        "base.stage_2": "must name a Stage II model",
        "stage_2.batch_size": "must be at least 2 with prior preservation",
        "stage_2.timesteps.shape": "must be left out with uniform (got [1.0, 1.0])",
        "stage_2.timesteps.hihg": "unknown key; did you mean high?",
        "stage_2.noise_level": "must be [low, high] with low <= high (got [9, 3])",
        "stage_2.adapter.targets.1": "must be a text (got 4)",
        "stage_2.optimizer.lora_plus_ratio": "must be 1 with lokr, which has no B matrices",
    }
    assert found.keys() == expected.keys()
    for path, message in expected.items():
        assert found[path].startswith(message)


@pytest.mark.parametrize(
    ("optimizer", "field", "message"),
    [
        ("{name: prodigy}", "learning_rate", "give 1, or at least 0.1"),
        ("{name: prodigy, learning_rate: 1, lora_plus_ratio: 2}", "lora_plus_ratio", "leave the"),
        ("{name: adafactor, betas: [0.9, 0.99]}", "betas", "adafactor has no betas"),
        ("{learning_rate: .inf}", "learning_rate", "finite"),
    ],
)
def test_settings_that_an_optimizer_cannot_take(
    tmp_path: Path, optimizer: str, field: str, message: str
) -> None:
    text = SMALL.replace("steps: 5", f"steps: 5, optimizer: {optimizer}")
    found = mistakes(tmp_path, text)
    assert list(found) == [f"stage_1.optimizer.{field}"]
    assert message in found[f"stage_1.optimizer.{field}"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("validation=null", "validation: must be a section of keys and values (got null)"),
        ("stage_1=5", "stage_1: must be a section of keys and values (got 5)"),
        ("validation.prompts=5", "validation.prompts: must be a list (got 5)"),
        (
            "stage_2.noise_level=[1, 2, 3]",
            "stage_2.noise_level: must have at most 2 item(s), not 3",
        ),
        ("stage_1.compile=auto", "stage_1.compile: must be true or false (got 'auto')"),
        ("seed=null", "seed: must be a whole number (got null)"),
        ("seed=true", "seed: must be a whole number (got true)"),
        (
            "stage_1.adapter.kind=roslra",
            "stage_1.adapter.kind: must be 'lora', 'rslora', 'dora', 'loha', 'lokr' or"
            " 'oft' (got 'roslra'); did you mean rslora?",
        ),
        ("text.device=gpu", "text.device: must be 'auto' or 'cpu' (got 'gpu')"),
    ],
)
def test_mistakes_are_in_words_of_yaml(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write(tmp_path, SMALL), [override])
    assert message in str(error.value)
    assert "uple" not in str(error.value)
    assert "after" not in str(error.value)


def test_a_prior_is_of_class_pictures_unless_it_says_otherwise(tmp_path: Path) -> None:
    pictures = load_recipe(write(tmp_path, SMALL + "prior: {prompts: [a dog], count: 3}"))
    assert isinstance(pictures.prior, PicturePrior)
    assert pictures.class_pictures == pictures.prior
    assert (pictures.prior.share, pictures.prior.count) == (0.5, 3)
    output = load_recipe(
        write(tmp_path, SMALL), ["prior.kind=output", "prior.prompts=everyday", "prior.weight=0.3"]
    )
    assert isinstance(output.prior, OutputPrior)
    assert output.class_pictures is None
    assert (output.prior.share, output.prior.weight) == (0.25, 0.3)
    for recipe in (pictures, output):
        assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ("3", "prior: must be a section of keys and values (got 3)"),
        (
            "{kind: outputs, prompts: [a]}",
            "prior.kind: must be 'output' or 'pictures' (got 'outputs'); did you mean output?",
        ),
        (
            "{kind: null, prompts: [a]}",
            "prior.kind: must be 'output' or 'pictures' (got null)",
        ),
        ("{kind: 3, prompts: [a]}", "prior.kind: must be 'output' or 'pictures' (got 3)"),
        ("{kind: output}", "prior.prompts: must be given"),
        (
            "{kind: output, prompts: evryday}",
            "prior.prompts: must be a list or 'everyday' or 'data' (got 'evryday');"
            " did you mean everyday?",
        ),
        ("{prompts: everyday}", "prior.prompts: must be a list (got 'everyday')"),
        (
            "{kind: output, prompts: [a, 1]}",
            "prior.prompts.1: must be a text (got 1)",
        ),
        (
            "{kind: output, prompts: [a], count: 4}",
            "prior.count: belongs to kind: pictures, but this is kind: output",
        ),
        (
            "{kind: output, prompts: [a], wight: 4}",
            "prior.wight: unknown key; did you mean weight?",
        ),
        ("{prompts: [a], fodler: x}", "prior.fodler: unknown key; did you mean folder?"),
        (
            "{prompts: [a], sampling: {stage_1: {stpes: 3}}}",
            "prior.sampling.stage_1.stpes: unknown key; did you mean steps?",
        ),
    ],
)
def test_mistakes_in_either_kind_of_prior(tmp_path: Path, prior: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write(tmp_path, SMALL), [f"prior={prior}"])
    assert str(error.value).partition(" has a mistake: ")[2].rstrip(".") == message


def texts_of(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """The paths of a section's fields that take a text or several, each with room for a text."""
    for name, field in section.model_fields.items():
        for kind in _options(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from texts_of(kind, f"{path}{name}.")
            elif kind is str or kind == tuple[str, ...]:
                yield f"{path}{name}", "TEXT" if kind is str else "[a sks dog, TEXT]"


COMPLETE = """
name: small
base: {stage_1: one, stage_2: two}
data: {source: pictures}
prior: {prompts: [a dog]}
stage_1: {steps: 5}
validation: {prompts: [a sks dog, a cat], best: {keep_others: null}}
evaluation:
  {identifier: sks dog, subject: dog, prompts: [a sks dog, a cat], expected: {data: a, clip_i: 0.5,
  clip_t: 0.5, spread: 0.1}}
"""


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ('""', "is empty"),
        ('" "', "has no visible character (found SPACE)"),
        (r'"a sks\0 dog"', r"has a NUL character (in 'a sks\x00 dog')"),
        (r'"a sks \ud800"', r"has a byte that is not UTF-8 (in 'a sks \ud800')"),
    ],
)
def test_no_text_of_any_section_is_empty_or_cannot_be_written(
    tmp_path: Path, text: str, flaw: str
) -> None:
    paths = dict(texts_of(Recipe))
    assert {"base.stage_1", "prior.prompts", "evaluation.class_prompts", "runs_dir"} <= {*paths}
    named = ("optimizer.name", "optimizer.schedule", "timesteps.density", "best.figure", "kind")
    for path, room in paths.items():
        if path == "name" or path.endswith(named) or path.startswith("stage_2"):
            continue  # one of some names
        tree = yaml.load(COMPLETE, Loader=Loader)
        *sections, key = path.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[key] = yaml.load(room.replace("TEXT", text), Loader=Loader)
        with pytest.raises(UserError) as error:
            check_section(Recipe, tree, "The recipe")
        place = f"{path}: {flaw}" if room == "TEXT" else f"{path}: text 2 {flaw}"
        assert place in str(error.value)


def test_a_list_in_a_file_has_no_such_texts_either(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("a dog\n\u200b\n")
    path = write(tmp_path, SMALL + f"prior: {{kind: output, prompts: {own}}}")
    with pytest.raises(UserError, match=r"prior.prompts: text 2 has no visible character"):
        load_recipe(path)


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("steps: 5", "steps: 5, optimizer: {learning_rate: 1e-3}"))
    recipe = load_recipe(path, ["stage_1.optimizer.weight_decay=2e-3", "name=1e4"])
    assert recipe.stage_1 is not None
    assert recipe.stage_1.optimizer.learning_rate == 1e-3
    assert recipe.stage_1.optimizer.weight_decay == 2e-3
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be a YAML file of keys and values"),
        ("name: [", "not valid YAML"),
        (SMALL + "name: again", "the key 'name' is given twice"),
        (SMALL.replace("steps: 5", "steps: 5, steps: 6"), "the key 'steps' is given twice"),
        (SMALL.replace("stage_1: {steps: 5}", ""), "nothing to train"),
        (SMALL + "stage_2: {steps: 5}", "base.stage_2: must name"),
        (SMALL + "prior: {prompts: [a dog]}\n", None),
        (
            SMALL.replace("steps: 5", "steps: 5, batch_size: 1, accumulation: 2")
            + "prior: {prompts: [a dog]}\n",
            None,
        ),
        (
            SMALL.replace("steps: 5", "steps: 5, timesteps: {density: logit_normal}"),
            r"timesteps.shape: must be \[mean, std\] with logit_normal",
        ),
        (
            SMALL.replace("steps: 5", "steps: 5, timesteps: {density: normal}"),
            "timesteps.density: unknown name 'normal'; did you mean",
        ),
        (SMALL.replace("steps: 5", "steps: 5, optimizer: {warmup_steps: 4}"), None),
        (
            SMALL.replace("steps: 5", "steps: 5, optimizer: {warmup_steps: 5}"),
            r"warmup_steps: must be less than stage_1.steps.*\(got 5 of 5 steps\)",
        ),
        (SMALL.replace("small", "../up"), "name: must be of the form"),
        (
            SMALL.replace("one}", "one, stage_2: two}")
            + "stage_2: {steps: 5, noise_level: [9, 3]}",
            r"stage_2.noise_level: must be \[low, high\]",
        ),
    ],
)
def test_whole_recipe_checks(tmp_path: Path, text: str, message: str | None) -> None:
    path = write(tmp_path, text)
    if message is None:
        load_recipe(path)
        return
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


LITERAL = ("a sks dog #3", "&dog", "12e4567", "0100", "12:30", "~/x", "[a]", "'a'", "a: b", "yes")

MOMENTS = ("a dog #3", "12:30", "2026-13-45")


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        *(("data.prompt", text, text) for text in LITERAL),
        *(("base.revision", text, text) for text in LITERAL),
        *(("data.source", text, text) for text in LITERAL),
        ("data.prompt", "null", None),
        ("base.stage_2", "null", None),
        ("name", "null", "null"),
        ("name", "007", "007"),
        ("seed", "0100", 100),
        ("seed", "0x1f", 31),
        ("seed", "0o17", 15),
        ("data.center_shift", "1e-1", 0.1),
        ("data.horizontal_flip", "true", True),
        ("validation.prompts", "['a dog #3', 12:30, 2026-13-45]", MOMENTS),
        ("stage_1.adapter.targets", "[to_q]", ("to_q",)),
        ("stage_1.adapter.targets", "to_q", "to_q"),
    ],
)
def test_an_override_of_a_text_is_that_text_and_others_are_yaml_1_2(
    tmp_path: Path, path: str, text: str, value: object
) -> None:
    node: object = load_recipe(write(tmp_path, SMALL), [f"{path}={text}"])
    for part in path.split("."):
        node = vars(node)[part]
    assert node == value
    assert type(node) is type(value)


def test_what_is_read_is_what_was_written_in_yaml_1_1_and_1_2(tmp_path: Path) -> None:
    for text in ("12:30", "0100", "0o17", "0x1f", "1_000", "2026-11-28", "yes", "=", "1e4"):
        recipe = load_recipe(write(tmp_path, SMALL), [f"data.prompt={text}"])
        assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
        assert yaml.safe_load(recipe.to_yaml())["data"]["prompt"] == text


@pytest.mark.parametrize(
    ("number", "meant"), [("0100", 100), ("-07", -7), ("0x10", 16), ("0o10", 8), ("12:30", "12:30")]
)
def test_numbers_of_a_file_are_those_of_yaml_1_2(number: str, meant: object) -> None:
    assert yaml.load(f"a: {number}", Loader=Loader) == {"a": meant}


@pytest.mark.parametrize("text", ["seed: !!int abc", "seed: !!float x", "[" * 5000])
def test_what_yaml_cannot_construct_is_said(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="is not valid YAML"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    "override",
    [
        *("steps", "stage_1.steps.deep=3", "seed=[1", "seed=5 #3", "seed=!!int abc"),
        *("validation.prompts=[a dog #3, b]", "validation.prompts=[a dog] #3"),
        *("validation.prompts=[&dog a]", "stage_1.adapter.targets=!to_q x"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match="override"):
        load_recipe(write(tmp_path, SMALL), [override])


def test_every_field_is_documented() -> None:
    schema = yaml.safe_dump(load_recipe(RECIPES[0]).model_json_schema())
    definitions = yaml.safe_load(schema)
    undocumented = [
        f"{name}.{field}"
        for name, section in {"Recipe": definitions, **definitions["$defs"]}.items()
        for field, content in section["properties"].items()
        if "description" not in content
    ]
    assert undocumented == []


def test_stage_2s_prompts_are_one_for_each(tmp_path: Path) -> None:
    sections = """
validation: {prompts: [a sks cat, a sks dog], stage_2_prompts: [a cat]}
evaluation: {prompts: [a sks cat], subject: cat, identifier: sks cat, clip: c, stage_2_prompts: []}
"""
    assert mistakes(tmp_path, SMALL + sections) == {
        "validation.stage_2_prompts": "must be one for each of the 2 prompts (got 1)",
        "evaluation.stage_2_prompts": "must be one for each of the 1 prompts (got 0)",
    }
    right = "validation: {prompts: [a sks cat], stage_2_prompts: [a cat]}"
    recipe = load_recipe(write(tmp_path, SMALL + right))
    assert recipe.validation.stage_2_prompts == ("a cat",)


def test_the_old_name_of_a_section_gets_the_new_one(tmp_path: Path) -> None:
    assert mistakes(tmp_path, SMALL + "comparison: {clip: c}") == {
        "comparison": "unknown key; is now evaluation"
    }


def test_an_override_deeper_than_any_key_is_a_sentence() -> None:
    with pytest.raises(UserError, match="unknown key"):
        load_recipe("recipes/quickstart.yaml", [".".join("a" * 3000) + "=1"])


BEST = """
name: small
base: {stage_1: one}
data: {source: pictures}
stage_1: {steps: 5}
validation:
  prompts: [a sks cat]
  other_prompts: [a dog]
  best: {figure: clip_i}
evaluation: {identifier: sks cat, subject: cat, prompts: [a sks cat on red], clip: clip}
"""


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("validation.prompts=[]", "validation.best.figure: clip_i needs validation.prompts"),
        ("evaluation=null", "validation.best.figure: clip_i needs evaluation"),
        ("validation.best.figure=held_out", "held_out needs validation.held_out"),
        ("validation.best.figure=clip-t", "unknown name 'clip-t'; did you mean clip_t?"),
        ("validation.other_prompts=[]", "validation.best.keep_others: needs validation.other_pro"),
        ("validation.best.keep_others=1.5", "must be at most 1"),
        ("evaluation.prompts=[a sks cat]", None),
        ("validation.best=true", "validation.best"),
        ("validation.through_stage_2=always", "through_stage_2: always needs base.stage_2"),
    ],
)
def test_the_best_needs_what_it_is_chosen_by(
    tmp_path: Path, override: str, mistake: str | None
) -> None:
    path = write(tmp_path, BEST)
    if mistake is None:
        assert load_recipe(path, [override]).validation.best is not None
        return
    with pytest.raises(UserError, match=re.escape(mistake)):
        load_recipe(path, [override])


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("evaluation.identifier=zzz", "evaluation.identifier: none of evaluation.prompts contains"),
        ("evaluation.identifier=", "evaluation.identifier: "),
        ("evaluation.subject= ", "evaluation.subject: "),
        ("evaluation.seed=9223372036854775808", "evaluation.seed: "),
        ("validation.seed=9223372036854775808", "validation.seed: "),
        ("evaluation.prompts=~nobody_of_this_name/a.txt", "names no user's home folder"),
    ],
)
def test_the_subject_and_seeds_are_such_that_pictures_can_be_drawn_and_scored(
    tmp_path: Path, override: str, mistake: str
) -> None:
    with pytest.raises(UserError, match=re.escape(mistake)):
        load_recipe(write(tmp_path, BEST), [override])


def test_the_best_is_not_chosen_by_the_pictures_of_the_evaluation(tmp_path: Path) -> None:
    path = write(tmp_path, BEST)
    same = ["evaluation.prompts=[a red dog, a sks cat]", "evaluation.seed=41", "validation.seed=42"]
    with pytest.raises(UserError, match="'a sks cat' is drawn with seed 42 in evaluation too"):
        load_recipe(path, same)
    load_recipe(path, [*same, "validation.best=null"])
