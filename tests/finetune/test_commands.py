"""Commands answer --help and a mistaken recipe before they import what is slow to import."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import ROOT
from tests.builders.recipes import SMALL, write

ANSWER = """
import sys
from importlib import import_module

try:
    import_module(f"finetune.{sys.argv[1]}").main(sys.argv[2:])
except SystemExit as done:
    print(done.code)
slow = {"torch", "diffusers", "transformers", "peft", "datasets", "accelerate", "bitsandbytes"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
"""


@pytest.mark.parametrize("name", ["train", "precompute", "plan", "evaluate", "compare", "sweep"])
def test_help_and_mistakes_import_nothing_that_is_slow_to_import(name: str, tmp_path: Path) -> None:
    recipe = write(tmp_path, SMALL.replace("steps", "stpes"))
    for argument, code, found in (
        ("--help", 0, f"usage: python -m finetune.{name}"),
        (str(recipe), 2, "stage_1.stpes: unknown key; did you mean steps?"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", ANSWER, name, argument], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(code)
        assert found in done.stdout + done.stderr
