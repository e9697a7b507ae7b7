"""Run tests with the oldest packages that pyproject.toml allows.

    python -m benchmarks.oldest_packages [--venv FOLDER] [TEST ...]

Every dependency with a lower bound is installed in the first release that the bound allows, all
others in the newest, into a virtual environment of its own. Then pytest runs there: by default the
tests of training, of exported adapters in diffusers and PEFT, of merging and of drawing.
"""

import argparse
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

TESTS = (
    "tests/finetune/test_train.py",
    "tests/finetune/test_learning.py",
    "tests/finetune/test_evaluate.py",
    "tests/adapters/files",
    "tests/adapters/merging",
    "tests/adapters/cascade",
    "tests/unets",
)
"""What a bound is most likely to break."""


def list_oldest(dependencies: Sequence[str]) -> list[str]:
    """Pin each dependency that has a lower bound to the releases that begin with it.

    A bound of 5 or 0.42 stands for all of 5.0 or 0.42: the first release is often withdrawn.
    """
    pins = []
    for each in map(Requirement, dependencies):
        for bound in each.specifier:
            if bound.operator == ">=":
                parts = bound.version.split(".")
                pins.append(f"{each.name}=={'.'.join(parts if parts[1:] else [*parts, '0'])}.*")
    return pins


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=Path(".oldest"), metavar="FOLDER")
    parser.add_argument("tests", nargs="*", default=TESTS, metavar="TEST")
    given = parser.parse_args(arguments)
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = list_oldest(project["dependencies"])
    python = given.venv / "bin" / "python"
    if not python.exists():
        venv.create(given.venv, with_pip=True)
    sys.stdout.write(f"Installing {' '.join(pins)}\n")
    install = [python, "-m", "pip", "install", "--quiet", "--editable", ".[dev]", *pins]
    subprocess.run(install, check=True)
    tests = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *given.tests]
    raise SystemExit(subprocess.run(tests, check=False).returncode)


if __name__ == "__main__":
    main()
