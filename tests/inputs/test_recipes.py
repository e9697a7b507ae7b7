"""Files of recipes that end in one sentence, and odd ones that are right."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from finetune.recipe.file import load_recipe
from finetune.recipe.yaml12 import MOST_LETTERS
from finetune.step.stages import STAGES
from finetune.train import main
from tests.builders.inputs import Refused, check_refused
from tests.builders.recipes import SMALL, write

DEEP = 5000
LONG = "x" * 120_000
HUGE = 10**30
NOBODY = "~nobody_of_this_name"


def path_case(name: str, make: Callable[[Path], object], *says: str) -> Refused:
    """A recipe file that is made in some way."""

    def arrange(folder: Path) -> Sequence[object]:
        path = folder / "recipe.yaml"
        make(path)
        return path, "--dry-run"

    return Refused(name, arrange, ("recipe.yaml", *says))


def whole(name: str, content: str | bytes, *says: str) -> Refused:
    """A recipe file with some content."""
    data = content.encode() if isinstance(content, str) else content
    return path_case(name, lambda path: path.write_bytes(data), *says)


def field(path: str, value: object, *says: str) -> Refused:
    """A right recipe in which one field has a value, as YAML writes it."""

    def arrange(folder: Path) -> Sequence[object]:
        return write(folder, put(path, value)), "--dry-run"

    shown = str(value)
    return Refused(f"{path}: {shown[:40]}", arrange, (f"has a mistake: {path}", *says))


def put(path: str, value: object) -> str:
    """Write a right recipe with a field below the sections that hold it."""
    tree = {
        "name": "small",
        "base": {"stage_1": "one", "stage_2": "two"},
        "data": {"source": "pictures"},
        "stage_1": {"steps": 5},
    }
    needed: Mapping[str, dict[str, object]] = {
        "stage_2": {"steps": 5},
        "prior": {"prompts": ["a dog"]},
        "evaluation": {"identifier": "sks dog", "subject": "dog", "prompts": ["a sks dog"]},
    }
    *sections, key = path.split(".")
    node: dict[str, object] = tree
    for section in sections:
        node = node.setdefault(section, dict(needed.get(section, {})))  # type: ignore[assignment]
    node[key] = Raw(str(value))
    return flow(tree)


class Raw(str):
    """A text that is YAML already."""


def flow(value: object) -> str:
    """Write a tree as YAML on one line."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(flow, value))}]"
    return str(value)


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MERGES = "m0: &m0 {x: 1}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}\n" for n in range(1, 10)
)

FILES = (
    path_case("missing", lambda path: None, "cannot be read: there is no such file"),
    path_case("a folder", Path.mkdir, "cannot be read: it is a folder, not a file"),
    path_case("a pipe", os.mkfifo, "cannot be read: it is a pipe or device, not a file"),
    path_case(
        "endless", lambda path: path.symlink_to("/dev/zero"), "it is a pipe or device, not a file"
    ),
    path_case("a link to nothing", lambda path: path.symlink_to("gone"), "there is no such file"),
    path_case(
        "a link to itself",
        lambda path: path.symlink_to(path),
        "cannot be read: Too many levels of symbolic links",
    ),
    whole("UTF-16", SMALL.encode("utf-16"), "it is in UTF-16; save it as UTF-8"),
    whole(
        "Windows-1252",
        f"{SMALL}# café\n".encode("cp1252"),
        "byte 0xe9 in line 6 is not UTF-8; save it as UTF-8",
    ),
    whole("a NUL", SMALL + "\0", "line 6: the character U+0000 is not allowed"),
    whole("a bell", "name: a\a", "line 1: the character U+0007 is not allowed"),
    whole("empty", "", "must be a YAML file of keys and values (got nothing)"),
    whole("comments alone", "# a\n", "must be a YAML file of keys and values (got nothing)"),
    whole("a list", "[1, 2]", "must be a YAML file of keys and values (got [1, 2])"),
    whole("a text", "hello", "must be a YAML file of keys and values (got 'hello')"),
    whole("a number", "5", "must be a YAML file of keys and values (got 5)"),
    whole("an open bracket", "name: [", "is not valid YAML: line 1, column 8: ", "expected"),
    whole("an open quote", "name: 'a", "is not valid YAML: line 1, column 9: ", "quoted scalar"),
    whole("tabs", "base:\n\tstage_1: a", "line 2, column 1: ", "'\\t' that cannot start any token"),
    whole("a colon too many", "name: a: b", "line 1, column 8: mapping values are not allowed"),
    whole("a key twice", f"{SMALL}name: again", "line 6, column 1: the key 'name' is given twice"),
    whole(
        "a key twice in a section",
        SMALL.replace("steps: 5", "steps: 5, steps: 6"),
        "line 5, column 21: the key 'steps' is given twice",
    ),
    whole("two documents", f"{SMALL}---\n{SMALL}", "a single document", "found another document"),
    whole("an unknown alias", f"{SMALL}prior: *p", "line 6, column 8: found undefined alias 'p'"),
    whole("aliases that multiply", ALIASES, "more than 100,000 values, with those of aliases"),
    whole("sections that multiply", MERGES, "more than 100,000 values, with those of aliases"),
    whole(
        "an alias within itself",
        f"{SMALL}prior: &p {{prompts: *p}}",
        "line 6, column 21: an alias within the value that it stands for",
    ),
    whole("deep lists", "a: " + "[" * DEEP, "more than 40 lists and sections within one another"),
    whole("deep closed lists", "a: " + "[" * DEEP + "]" * DEEP, "more than 40 lists and sections"),
    whole("deep sections", "{a: " * DEEP + "1" + "}" * DEEP, "more than 40 lists and sections"),
    whole(
        "deep lines",
        "".join(f"{' ' * depth}a:\n" for depth in range(100)),
        "line 41, column 41: more than 40 lists and sections within one another",
    ),
    whole("an int that is none", "seed: !!int abc", "line 1, column 7: 'abc' is no int"),
    whole("a float that is none", "seed: !!float x", "line 1, column 7: 'x' is no float"),
    whole("a bool that is none", "seed: !!bool 3", "line 1, column 7: '3' is no bool"),
    whole("a moment", "seed: !!timestamp 2026-13-45", "the tag '!!timestamp' is of no type"),
    whole("bytes", "seed: !!binary aGVsbG8=", "the tag '!!binary' is of no type used here"),
    whole("a set", "seed: !!set {a, b}", "the tag '!!set' is of no type used here"),
    whole("a tag", "seed: !dog 3", "line 1, column 7: the tag '!dog' is of no type used here"),
    whole(
        "code",
        "seed: !!python/object/apply:os.system ['true']",
        "the tag '!!python/object/apply:os.system' is of no type used here",
    ),
    whole("an escape", 'name: "\\UFFFFFFFF"', "is not valid YAML: ", "out of range"),
    whole("many digits", f"seed: {'1' * DEEP}", "a number of 5,000 digits, more than 40"),
    whole("many hexadecimal digits", f"seed: 0x{'1' * DEEP}", "a number of 5,002 digits"),
    whole("many letters", f"a: {'x' * MOST_LETTERS}", "it has 2,097,155 letters, more than"),
    whole("many bytes", "é" * 5 * 2**20, "it has 10.0 MiB, more than 8"),
    whole("a section as key", "{[a]: 3}", "is not valid YAML: line 1, column 2: "),
    whole("a number as key", f"{SMALL}1: 2", "has a mistake: 1: "),
    whole("nothing as key", f"{SMALL}null: 2", "has a mistake: None: "),
    whole("no stage", SMALL.replace("stage_1: {steps: 5}", ""), "stage_1: nothing to train"),
    whole("no base", SMALL.replace("base: {stage_1: one}", ""), "mistake: base: must be given"),
    whole("no name", SMALL.replace("name: small", ""), "has a mistake: name: must be given"),
)

COUNTS = "must be a whole number"
FIELDS = (
    field("seed", -1, "must be at least 0 (got -1)"),
    field("seed", HUGE, "must be below 9,223,372,036,854,775,808"),
    field("seed", 1.5, f"{COUNTS} (got 1.5)"),
    field("seed", "1e3", f"{COUNTS} (got 1000.0)"),
    field("seed", "12:30", f"{COUNTS} (got '12:30')"),
    field("seed", "1_000", f"{COUNTS} (got '1_000')"),
    field("seed", "true", f"{COUNTS} (got true)"),
    field("seed", "[1, 2]", f"{COUNTS} (got [1, 2])"),
    field("seed", f"[{'1, ' * 500}1]", f"{COUNTS} (got [1, 1, 1", "(1,503 letters)"),
    field("stage_1.steps", 0, "must be at least 1 (got 0)"),
    field("stage_1.steps", 10**9, "must be at most 100,000,000 (got 1000000000)"),
    field("stage_1.steps", HUGE, "must be at most 100,000,000"),
    field("stage_1.batch_size", 10**9, "must be at most 10,000"),
    field("stage_1.accumulation", 10**9, "must be at most 10,000"),
    field("stage_1.checkpoint_every", HUGE, "must be at most 1,000,000,000"),
    field("stage_1.keep_checkpoints", 0, "must be at least 1"),
    field("stage_1.adapter.rank", 0, "must be at least 1"),
    field("stage_1.adapter.rank", 10**9, "must be at most 65,536"),
    field("stage_1.adapter.alpha", 0, "must be above 0 (got 0)"),
    field("stage_1.adapter.alpha", ".inf", "must be a finite number (got inf)"),
    field("stage_1.adapter.alpha", ".nan", "must be a finite number (got nan)"),
    field("stage_1.adapter.dropout", 1, "must be below 1"),
    field("stage_1.adapter.kind", "lroa", "(got 'lroa'); did you mean lora?"),
    field("stage_1.adapter.targets", "[]", "must have at least 1 item(s), not 0"),
    field("stage_1.optimizer.learning_rate", 0, "must be above 0"),
    field("stage_1.optimizer.learning_rate", "1e31", "must be at most 1e+30"),
    field("stage_1.optimizer.learning_rate", "1e400", "must be a finite number"),
    field("stage_1.optimizer.learning_rate", "1e-4x", "must be a number (got '1e-4x')"),
    field("stage_1.optimizer.learning_rate", '"1,5"', "must be a number (got '1,5')"),
    field("stage_1.optimizer.weight_decay", -1, "must be at least 0"),
    field("stage_1.optimizer.betas", "[0.9]", "betas.1: must be given"),
    field("stage_1.optimizer.betas", "[0.9, 1]", "betas.1: must be below 1"),
    field("stage_1.optimizer.max_grad_norm", 0, "must be above 0"),
    field("stage_1.optimizer.warmup_steps", 5, "must be less than stage_1.steps"),
    field("stage_1.optimizer.name", LONG, "unknown name 'xxx", "(120,000 letters)"),
    field("stage_1.min_snr_gamma", 0, "must be above 0"),
    field("stage_1.ema_decay", 1, "must be below 1"),
    field("stage_1.noise_level", "[0, 9]", "is for stage_2 alone"),
    field("stage_2.noise_level", "[9, 3]", "must be [low, high] with low <= high (got [9, 3])"),
    field("stage_2.noise_level", "[3]", "noise_level.1: must be given"),
    field("stage_2.noise_level", "[0, 1.5]", "noise_level.1: must be a whole number"),
    field("stage_1.timesteps.low", HUGE, "must be at most 1,000,000,000"),
    field("stage_1.timesteps", "{low: 9, high: 3}", "timesteps.high: must be at least low, 9"),
    field("stage_1.timesteps", "{density: beta}", "timesteps.shape: must be [a, b] with beta"),
    field("stage_1.precision", "fp8", "(got 'fp8'); did you mean"),
    field("stage_1.compile", "yes", "must be true or false (got 'yes')"),
    field("data.horizontal_flip", "on", "must be true or false (got 'on')"),
    field("data.caption_dropout", 1.5, "must be at most 1 (got 1.5)"),
    field("data.center_shift", -0.1, "must be at least 0"),
    field("data.prompt", '""', "is empty; write some text"),
    field("data.prompt", '" "', "has no visible character (found SPACE)"),
    field("data.prompt", r'"a\0b"', r"has a NUL character (in 'a\x00b')"),
    field("data.prompt", r'"a \ud800"', "has a byte that is not UTF-8"),
    field("data.prompt", LONG, "has 120,000 letters, more than 10,000; shorten it"),
    field("data.prompt", 12, "must be a text (got 12)"),
    field("data.prompt", '"a {} dog"', "{} is evaluation.identifier: give that, or write it out"),
    field("data.source", f"{NOBODY}/dog", NOBODY, "names no user's home folder; correct"),
    field("base.revision", "0100", "must be a text (got 100)"),
    field("base.stage_1", f"{NOBODY}/if", "names no user's home folder"),
    field("base.stage_1", '""', "is empty; write some text"),
    field("runs_dir", f"{NOBODY}/runs", "names no user's home folder"),
    field("cache_dir", f"{NOBODY}/cache", "names no user's home folder"),
    field("prior.folder", f"{NOBODY}/dogs", "names no user's home folder"),
    field("prior.count", 10**9, "must be at most 100,000"),
    field("prior.share", 1, "must be below 1"),
    field("prior.weight", ".inf", "must be a finite number"),
    field("prior.prompts", "[]", "must have at least 1 item(s), not 0"),
    field("prior.kind", "[a]", "(got ['a'])"),
    field("validation.prompts", "{a: b}", "must be a list (got {'a': 'b'})"),
    field("validation.prompts", f"[a, {LONG}]", "text 2 has 120,000 letters"),
    field("validation.every", 0, "must be at least 1"),
    field("validation.held_out", -1, "must be at least 0"),
    field("validation.seed", 2**63, "must be below 9,223,372,036,854,775,808"),
    field("validation.loss_pictures", HUGE, "must be at most 1,000,000,000"),
    field("evaluation.pictures_per_prompt", 10**9, "must be at most 1,000"),
    field("evaluation.clip", f"{NOBODY}/clip", "names no user's home folder"),
    field("evaluation.identifier", "zzz", "none of evaluation.prompts contains it (got 'zzz')"),
    field("log_every", 0, "must be at least 1"),
    field("trackers", "[wandb]", "must begin with tensorboard"),
    field("trackers", "[tensorboard, wnadb]", "trackers.1: must be ", "(got 'wnadb')"),
    field("name", "../up", "must be of the form"),
    field("name", '"a\\nb"', "must be of the form", r"(got 'a\nb')"),
    field("name", "x" * 101, "must have at most 100 letters"),
    field("stpes", 3, "unknown key"),
    field("stage_1.lr", 3, "unknown key; it is stage_1.optimizer.learning_rate"),
    field("stage_1", 5, "must be a section of keys and values (got 5)"),
    field("stage_1", "[5]", "must be a section of keys and values (got [5])"),
)


@pytest.mark.parametrize("case", [*FILES, *FIELDS], ids=lambda case: case.name)
def test_a_recipe_is_refused(
    case: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, main, tmp_path, capsys)


def text_list(name: str, make: Callable[[Path], object], *says: str) -> Refused:
    """A recipe with a list of prompts in a file."""

    def arrange(folder: Path) -> Sequence[object]:
        make(folder / "own.txt")
        return write(folder, put("evaluation.prompts", folder / "own.txt")), "--dry-run"

    return Refused(name, arrange, ("evaluation.prompts: the list ", "own.txt", *says))


LISTS = (
    text_list("missing", lambda path: None, "cannot be read (there is no such file)"),
    text_list("a folder", Path.mkdir, "cannot be read (it is a folder, not a file)"),
    text_list("a pipe", os.mkfifo, "cannot be read (it is a pipe or device, not a file)"),
    text_list("empty", lambda path: path.write_text("# a\n\n"), "has no prompts"),
    text_list(
        "UTF-16",
        lambda path: path.write_bytes("a sks dog".encode("utf-16")),
        "it is in UTF-16; save it as UTF-8",
    ),
    text_list(
        "Windows-1252",
        lambda path: path.write_bytes(b"a sks dog\na caf\xe9\n"),
        "byte 0xe9 in line 2 is not UTF-8; save it as UTF-8",
    ),
    text_list(
        "many bytes", lambda path: path.write_bytes(b"a\n" * 2**20), "it has 2.0 MiB, more than 1"
    ),
)


@pytest.mark.parametrize("case", LISTS, ids=lambda case: case.name)
def test_a_list_of_prompts_is_refused(
    case: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, main, tmp_path, capsys)


def test_of_many_mistakes_the_first_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, SMALL + "".join(f"key_{n}: {LONG[:1000]}\n" for n in range(900)))
    with pytest.raises(SystemExit, match="2"):
        main([str(recipe), "--dry-run"])
    shown = capsys.readouterr().err
    assert "has 900 mistakes:\n  key_0: unknown key" in shown
    assert shown.endswith("\n  and 870 more\n")
    assert len(shown) < 10_000


@pytest.mark.parametrize(
    ("path", "written", "value"),
    [
        ("data.prompt", "yes", "yes"),
        ("data.prompt", "12:30", "12:30"),
        ("data.prompt", "2026-13-45", "2026-13-45"),
        ("data.prompt", "=", "="),
        ("data.prompt", '"null"', "null"),
        ("data.prompt", "null", None),
        ("data.prompt", "a 猫 🐙", "a 猫 🐙"),
        ("data.prompt", "'#3 & *'", "#3 & *"),
        ("data.prompt", "!!str 5", "5"),
        ("data.prompt", "x" * 10_000, "x" * 10_000),
        ("stage_1.steps", "0100", 100),
        ("stage_1.steps", "0o17", 15),
        ("stage_1.steps", "!!int 7", 7),
        ("stage_1.optimizer.learning_rate", "1e-3", 1e-3),
        ("stage_1.optimizer.learning_rate", "1", 1.0),
        ("stage_1.compile", "TRUE", True),
        ("seed", "0x1F", 31),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("name", "x" * 100, "x" * 100),
        ("validation.prompts", "[yes, 12:30, '1']", ("yes", "12:30", "1")),
        ("validation.prompts", "[]", ()),
        ("stage_2.noise_level", "[7, 7]", (7, 7)),
    ],
    ids=lambda each: str(each)[:30],
)
def test_a_value_is_taken_as_it_is_written(
    path: str, written: object, value: object, tmp_path: Path
) -> None:
    node: object = load_recipe(write(tmp_path, put(path, written)))
    for part in path.split("."):
        node = vars(node)[part]
    assert node == value
    assert type(node) is type(value)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + SMALL.encode(),
        SMALL.replace("\n", "\r\n").encode(),
        f"%YAML 1.2\n---{SMALL}...\n".encode(),
        b'{"name": "small", "base": {"stage_1": "one"}, "data": {"source": "pictures"},'
        b' "stage_1": {"steps": 5}}',
        b"stage_1: &x {steps: 5}\n" + SMALL.replace("stage_1: {steps: 5}", "").encode(),
    ],
    ids=["a mark of byte order", "lines of Windows", "a directive", "JSON", "an anchor"],
)
def test_a_file_is_read_in_whatever_form(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    assert load_recipe(file) == load_recipe(write(tmp_path, SMALL))


def test_sections_may_share_what_they_have_in_common(tmp_path: Path) -> None:
    text = SMALL.replace("one}", "one, stage_2: two}").replace("stage_1: {", "stage_1: &s {")
    recipe = load_recipe(write(tmp_path, f"{text}stage_2: {{<<: *s, batch_size: 2}}"))
    assert recipe.stage_1 is not None
    assert recipe.stage_2 == recipe.stage_1.model_copy(update={"batch_size": 2})


def test_the_home_folder_is_expanded_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.txt").write_text("a sks dog\n")
    paths = {
        "base.stage_1": "~/if/1",
        "base.stage_2": "~/if/2",
        "runs_dir": "~/runs",
        "cache_dir": "~",
        "evaluation.prompts": "~/own.txt",
    }
    recipe = load_recipe(
        write(tmp_path, put("evaluation.seed", 7)), [f"{k}={v}" for k, v in paths.items()]
    )
    assert [recipe.source(stage).name for stage in STAGES.values()] == [
        str(tmp_path / "if/1"),
        str(tmp_path / "if/2"),
    ]
    assert (recipe.folder, recipe.cache) == (tmp_path / "runs" / "small", tmp_path)
    assert recipe.evaluation is not None
    assert recipe.evaluation.prompts == ("a sks dog",)
    assert load_recipe("~/recipe.yaml").name == "small"
    assert "runs_dir: ~/runs" in recipe.to_yaml()
