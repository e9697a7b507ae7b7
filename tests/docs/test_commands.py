"""The commands and the Python of the README and of every page, run from top to bottom.

A small random cascade stands in for gated weights and for the embedded cascade, and pictures take
two denoising steps. Commands that would train, score or need the hub are given to their own
parsers, and their recipes are checked.
"""

import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import parse_args as parse_torchrun

import adapters
from adapters import AdapterSpec, Sampling
from finetune.recipe.file import load_recipe
from finetune.recipe.reference import list_paths
from tests.builders import ROOT
from tests.builders.adapters import export, trained_unet
from tests.builders.random_cascade import RandomCascade
from tests.builders.repository import furnish

PAGES = [ROOT / "README.md", ROOT / "datasets/README.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(r"^( *)```(bash|python|yaml)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

RUNS = ("quickstart", "robot", "dog", "style", "my_dog")
"""The runs whose adapters the pages use."""

SUBJECTS = ("my_dog", "my_woodcuts")
"""The folders of pictures that a reader would have."""

HARMLESS = ("source", "export", "hf auth login", "tensorboard --logdir")
"""The commands that are not the project's own."""

SAMPLING = {
    "stage_1": {"steps": 2, "guidance": 3.0},
    "stage_2": {"steps": 1, "guidance": 1.0, "noise_level": 100},
}
"""The settings that these runs were validated with."""

LONG = ("evaluate", "compare", "plan", "push")
"""The modules whose work is left out: their arguments are parsed, and their recipes read."""


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each block of code."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [
        (language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE))
        for indent, language, text in found
    ]


def commands_of(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def exported(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters of both stages of a run."""
    folder = tmp_path_factory.mktemp("exported")
    furnish(folder, random_cascade)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for stage in (1, 2):
            base, spec = Path(f"models/if-tiny/stage_{stage}"), AdapterSpec(rank=16)
            unet = trained_unet(base, spec, seed=stage)
            export(unet, folder / "adapters", base, stage, spec, sampling=SAMPLING)
    return folder / "adapters"


@pytest.fixture
def place(
    random_cascade: RandomCascade,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder like the repository, with pictures and with finished runs."""
    furnish(tmp_path, random_cascade)
    for name in SUBJECTS:
        shutil.copytree(ROOT / "datasets/octopus", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for name in RUNS:
        shutil.copytree(exported, tmp_path / "runs" / name / "adapters")
        recipe = load_recipe("recipes/quickstart.yaml", [f"name={name}"])
        (tmp_path / "runs" / name / "recipe.yaml").write_text(recipe.to_yaml())
    monkeypatch.setattr(Sampling, "steps", lambda self, stage: 2)
    monkeypatch.setattr(Sampling, "timesteps", lambda self, stage: None)
    monkeypatch.setattr(adapters, "load_cascade", load_small)
    for name in LONG:
        package = "adapters" if name == "push" else "finetune"
        module = import_module(f"{package}.{name}")
        monkeypatch.setattr(module, "run_command", without_work(module.run_command))
    return tmp_path


def load_small(*stages: str, memory: str | None = None, **options: Any) -> adapters.Cascade:
    """Load the small cascade in place of DeepFloyd's, and never an upscaler."""
    from adapters.cascade.load import load_cascade

    return load_cascade(*(f"models/if-tiny/stage_{n}" for n in (1, 2)[: len(stages)]), **options)


def without_work(run: Callable[..., None]) -> Callable[..., None]:
    """The frame of a command without its work, which is the last argument."""

    def run_without_work(*arguments: Any, **options: Any) -> None:
        run(*arguments[:-1], lambda *given: "", **options)

    return run_without_work


def run_module(module: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of the project, with the small cascade in place of gated weights."""
    main = import_module(module).main
    if module == "finetune.train":
        dry = () if "--dry-run" in arguments else ("--dry-run",)
        main([*arguments, *dry])
    elif module == "finetune.sweep":
        from finetune.sweeping.points import plan_points

        checked: list[Any] = []
        monkeypatch.setattr(
            "finetune.sweep.run_sweep", lambda sweep, command: checked.append(plan_points(sweep))
        )
        main(arguments)
        assert checked
    elif module == "finetune.precompute":
        main([*arguments, "base.stage_1=models/if-tiny/stage_1", "base.variant=null"])
    else:
        main(arguments)


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = " ".join(words)
    if line.startswith(HARMLESS):
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["accelerate", "launch"]:
        given = launch_command_parser().parse_args(words[2:])
        assert given.quiet, "an error would end in the launcher's traceback"
        assert given.module
        assert Path(given.config_file).exists()
        run_module(given.training_script, given.training_script_args, monkeypatch)
    elif words[0] == "torchrun":
        launched = parse_torchrun(words[1:])
        assert launched.module
        run_module(launched.training_script, launched.training_script_args, monkeypatch)
    else:
        assert words[:2] == ["python", "-m"], line
        run_module(words[2], words[3:], monkeypatch)


def status_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a command."""
    try:
        run_command(words, monkeypatch)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_says_works(
    page: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known: dict[str, Any] = {}
    for language, text in blocks_of(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), known)
        elif language == "yaml":
            check_keys(yaml.safe_load(text))
        for words in commands_of(text) if language == "bash" else ():
            status = status_of(words, monkeypatch)
            assert status == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"


def check_keys(tree: dict[str, Any], path: str = "") -> None:
    for name, below in tree.items():
        assert f"{path}{name}" in list_paths()
        if isinstance(below, dict):
            check_keys(below, f"{path}{name}.")


def test_the_pages_have_commands() -> None:
    blocks = [(language, text) for page in PAGES for language, text in blocks_of(page)]
    assert sum(len(commands_of(text)) for language, text in blocks if language == "bash") > 40
    assert sum(language == "python" for language, _ in blocks) > 6


def test_lines_of_prose_fit_an_editor() -> None:
    long = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in PAGES
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100 and not line.startswith(("|", ">"))  # tables, and quoted sentences
    ]
    assert not long
