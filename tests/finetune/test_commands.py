"""The frame of commands: quick answers, overrides wherever they stand, and a short dry run."""

import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from adapters.errors import UserError
from finetune.command import run_command
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import OutputPrior, Recipe
from finetune.train import main as train
from tests.builders import ROOT
from tests.builders.recipes import SMALL, write

ANSWERS = """
import runpy, sys

name, mistaken = sys.argv[1:]
for argument in ("--help", mistaken):
    sys.argv = [name, argument]
    try:
        runpy.run_module(f"finetune.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as done:
        print("status", done.code)
slow = {"torch", "diffusers", "transformers", "peft", "datasets", "accelerate", "bitsandbytes"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
"""


@pytest.mark.parametrize("name", ["train", "precompute", "plan", "evaluate", "compare", "sweep"])
def test_help_and_mistakes_import_nothing_that_is_slow_to_import(name: str, tmp_path: Path) -> None:
    recipe = write(tmp_path, SMALL.replace("steps", "stpes"))
    command = [sys.executable, "-c", ANSWERS, name, str(recipe)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^status (\d)$", done.stdout, re.MULTILINE) == ["0", "2"]
    assert f"usage: python -m finetune.{name}" in done.stdout
    assert "stage_1.stpes: unknown key; did you mean steps?" in done.stderr


EVALUATION = "evaluation: {identifier: sks dog, subject: dog, prompts: [a sks dog]}"


@pytest.fixture
def parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Recipe, object]]:
    """A command with an option of several values; it returns the recipe and these values."""
    recipe = write(tmp_path, f"{SMALL}{EVALUATION}")
    monkeypatch.chdir(tmp_path)

    def parse(*arguments: str) -> tuple[Recipe, object]:
        found: list[tuple[Recipe, object]] = []

        def work(recipe: Recipe, options: Namespace) -> str:
            found.append((recipe, options.adapters))
            return ""

        options = {"nargs": "*", "action": "extend"}
        run_command("evaluate", "", [str(recipe), *arguments], work, adapters=options)
        return found[0]

    return parse


def test_overrides_may_stand_behind_an_option_with_several_values(
    parsed: Callable[..., tuple[Recipe, object]],
) -> None:
    after = ["evaluation.pictures_per_prompt=2", "seed=5"]
    recipe, adapters = parsed("--adapters", "runs/a=0.5", after[0], "you/name@v2", after[1])
    assert adapters == ["runs/a=0.5", "you/name@v2"]
    assert recipe.evaluation is not None
    assert (recipe.evaluation.pictures_per_prompt, recipe.seed) == (2, 5)
    assert parsed(*after, "--adapters", "runs/a=0.5") == (recipe, ["runs/a=0.5"])
    assert parsed(*after)[1] is None


def test_a_folder_that_is_called_as_a_key_is_an_adapter(
    parsed: Callable[..., tuple[Recipe, object]],
) -> None:
    Path("seed").mkdir()
    recipe, adapters = parsed("--adapters", "seed=5")
    assert (recipe.seed, adapters) == (0, ["seed=5"])


def test_a_mistaken_override_behind_such_an_option_is_a_mistake_of_the_recipe(
    parsed: Callable[..., tuple[Recipe, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed("--adapters", "a", "evaluation.picturs_per_prompt=2")
    assert "unknown key; did you mean pictures_per_prompt?" in capsys.readouterr().err


def test_dry_run_shows_a_few_of_many_prompts_and_is_no_recipe_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart = ROOT / "recipes" / "quickstart.yaml"
    captions = f"prior.prompts={ROOT / 'models/if-tiny/captions.txt'}"
    train([str(quickstart), "--dry-run", captions])
    shown = capsys.readouterr().out
    prompts = yaml.safe_load(shown)["prior"]["prompts"]
    recipe = load_recipe(quickstart, [captions])
    assert isinstance(recipe.prior, OutputPrior)
    more = len(recipe.prior.prompts) - 3
    assert prompts == [*recipe.prior.prompts[:3], {"and": f"{more} more"}]
    assert "training writes them to runs/quickstart/recipe.yaml" in shown
    with pytest.raises(UserError, match=rf"prior.prompts.3: .*'{more} more'"):
        load_recipe(write(tmp_path, shown))
    train([str(quickstart), "--dry-run", "prior=null"])
    assert load_recipe(write(tmp_path, capsys.readouterr().out)).prior is None
