"""Recipes, overrides, sweeps, bases and environments as real command lines."""

import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.builders import ROOT
from tests.builders.inputs import SECONDS
from tests.builders.recipes import SMALL

QUICKSTART = "recipes/quickstart.yaml"
SWEEP = "recipe: recipes/quickstart.yaml\n"
DEEP = "a: " + "[" * 5000
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


def run(
    arguments: Sequence[object], variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(variables or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def seconds_of_processes() -> float:
    """The processor's time of all processes that have ended, which other work does not prolong."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("content", "arguments", "variables", "says"),
    [
        ("[", ["train", "FILE"], {}, "is not valid YAML: line 1, column 2: "),
        (DEEP, ["train", "FILE"], {}, "more than 40 lists and sections within one another"),
        (BOMB, ["plan", "FILE"], {}, "more than 100,000 values, with those of aliases"),
        (SMALL, ["plan", "FILE", "stage_1.batch_size=1000000000"], {}, "must be at most 10,000"),
        (SMALL, ["train", "FILE", f"seed={10**30}"], {}, "seed: must be below 9,223,372,036,854"),
        (SMALL, ["precompute", "FILE", "seed=5 #3"], {}, "contains '#3', which YAML does not"),
        (SMALL, ["evaluate", "FILE", "runs_dir=~nobody_/x"], {}, "names no user's home folder"),
        (SMALL, ["compare", "FILE", "stage_1.lr=3"], {}, "it is stage_1.optimizer.learning_rate"),
        (SWEEP, ["sweep", "FILE", "--random", "1000000000"], {}, "random: must be at most 1,000"),
        ("", ["init", "FILE", "--subject", "dog"], {}, "is not a folder: name the one with your"),
        (SMALL, ["train", "FILE", "--dry-run"], {"RANK": "abc"}, "RANK in the environment must be"),
        (SMALL, ["train", "FILE"], {"LOCAL_RANK": "0"}, "LOCAL_RANK in the environment is 0, but"),
        (
            SMALL,
            ["train", "FILE"],
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "many"},
            "Accelerate cannot set up this process (",
        ),
        (
            SMALL,
            ["train", "FILE", "base.stage_1=models/if-tiny/stage_1", "base.stage_2=./nowhere"],
            {},
            "'./nowhere' is neither a folder that exists nor a hub name",
        ),
    ],
    ids=lambda each: "" if not isinstance(each, list) else " ".join(each[2:])[:40] or each[0],
)
def test_a_command_ends_in_one_sentence(
    content: str,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    says: str,
    tmp_path: Path,
) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(content)
    started = seconds_of_processes()
    name, *others = (str(file) if each == "FILE" else each for each in arguments)
    if name == "train" and "base.stage_2=./nowhere" in others:
        others += [f"runs_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache", "stage_2.steps=5"]
    done = run([f"finetune.{name}", *others], variables)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: "), done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]
    assert seconds_of_processes() - started < 2 * SECONDS  # with the imports


def test_a_terminal_of_ascii_is_written_to(tmp_path: Path) -> None:
    override = ["data.prompt=a 猫", "stage_1=null"]
    done = run(
        ["finetune.train", QUICKSTART, "--dry-run", *override], {"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert r"prompt: a \u732b" in done.stdout
