"""Sweeps that end in one sentence before any run starts."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from finetune.sweep import main
from tests.builders.inputs import Refused, check_refused
from tests.builders.recipes import SMALL, write

EVALUATION = """
evaluation: {identifier: sks dog, subject: dog, prompts: [a sks dog], other_prompts: [a cat]}
"""
RANK = "stage_1.adapter.rank"


def sweep(name: str, content: str, *says: str) -> Refused:
    """A sweep's file over a right recipe, which stands as RECIPE in it."""

    def arrange(folder: Path) -> Sequence[object]:
        recipe, file = write(folder, SMALL + EVALUATION), folder / "sweep.yaml"
        file.write_text(content.replace("RECIPE", str(recipe)))
        return (file,)

    return Refused(name, arrange, says)


def made(name: str, make: Callable[[Path], object], *says: str) -> Refused:
    """A sweep's file that is made in some way."""

    def arrange(folder: Path) -> Sequence[object]:
        make(folder / "sweep.yaml")
        return (folder / "sweep.yaml",)

    return Refused(name, arrange, ("sweep.yaml", *says))


def over(name: str, axis: str, *says: str) -> Refused:
    """A sweep's file with one axis."""
    return sweep(name, f"recipe: RECIPE\nover: {{{axis}}}", *says)


def options(name: str, arguments: Sequence[str], *says: str) -> Refused:
    """A right recipe with options of the command."""

    def arrange(folder: Path) -> Sequence[object]:
        return write(folder, SMALL + EVALUATION), *arguments

    return Refused(name, arrange, says)


TEN = "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"
CASES = (
    made("missing", lambda path: None, "cannot be read: there is no such file"),
    made("a pipe", os.mkfifo, "cannot be read: it is a pipe or device, not a file"),
    made("deep", lambda path: path.write_text("over: " + "[" * 5000), "more than 40 lists"),
    sweep("no recipe", "over: {seed_: [1]}", "has a mistake: recipe: must be given"),
    sweep("a missing recipe", "recipe: gone.yaml\nover: {}", "The recipe gone.yaml cannot be read"),
    sweep("an unknown home", "recipe: ~nobody_of_this_name/a\nover: {}", "no user's home folder"),
    sweep("a list of axes", "recipe: RECIPE\nover: [a]", "over: must be a section of keys and"),
    sweep("a number as axis", "recipe: RECIPE\nover: {1: [2]}", "over", "must be a text"),
    sweep("an unknown key", "recipe: RECIPE\novre: {}\nover: {}", "ovre: unknown key; did you"),
    sweep("a name", "recipe: RECIPE\nname: a/b", "name: must be of the form"),
    sweep("a long name", f"recipe: RECIPE\nname: {'a' * 101}", "at most 100 letters"),
    sweep("a seed", "recipe: RECIPE\nseeds: [-1]", "seeds.0: must be at least 0 (got -1)"),
    sweep("a large seed", f"recipe: RECIPE\nseeds: [{10**30}]", "seeds.0: must be below"),
    sweep("a scale", "recipe: RECIPE\nscales: [.inf]", "scales.0: must be a finite number"),
    sweep("two of one", "recipe: RECIPE\nscales: [1, 1.0]", "scales: must be different"),
    sweep("overrides", "recipe: RECIPE\noverrides: [5]", "overrides.0: must be a text (got 5)"),
    sweep("an override", "recipe: RECIPE\noverrides: [steps]", "must be key=value (got 'steps')"),
    sweep("many draws", f"recipe: RECIPE\nrandom: {10**9}\nover: {{}}", "must be at most 1,000"),
    over("an unknown field", "stage_1.stpes: [1]", "stage_1.stpes: unknown key; did you mean"),
    over("no values", f"{RANK}: []", f"{RANK} must be a list of values", "(got [])"),
    over("a value", f"{RANK}: 4", f"{RANK} must be a list of values", "(got 4)"),
    over("a large value", f"{RANK}: [{10**9}]", "must be at most 65,536 (got 1000000000)"),
    over("an end", f"{RANK}: {{low: 1, high: .inf}}", "high must be a number from", "(got inf)"),
    over("a text as end", f"{RANK}: {{low: a, high: 3}}", "low must be a number (got 'a')"),
    over("a range", f"{RANK}: {{low: 1, high: 3}}", "a range needs random"),
    over("an end by name", f"{RANK}: {{low: 1, hihg: 3}}", "unknown key 'hihg'; did you mean high"),
    over("the seed", "seed: [1]", "seed cannot be varied: name the seeds of training in seeds"),
    sweep(
        "many runs",
        f"recipe: RECIPE\nover: {{a: {TEN}, b: {TEN}, c: {TEN}, d: {TEN}}}",
        "it has 10,000 runs, more than 1,000: vary less, or draw at random",
    ),
    options("an axis without values", ["--over", RANK], "--over must be key=value,value"),
    options("an open bracket", ["--over", f"{RANK}=[1"], "is not valid YAML ("),
    options("a scale in words", ["--scales", "one"], "scales.0: must be a number (got 'one')"),
    options("none at once", ["--at-once", "0"], "at_once: must be at least 1 (got 0)"),
    options("a share", ["--keep-others", "-1"], "keep_others: must be at least 0"),
    options("a long option", ["--random", "9" * 5000], "--random '999", "5,000 digits"),
    options("no other prompts", ["evaluation=null"], "the recipe needs an evaluation section"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_sweep_is_refused(
    case: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, main, tmp_path, capsys)
