"""Packages: what they may import, that they are typed, and that no folder hides a library."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from tests.builders import ROOT


def test_the_datasets_library_is_not_shadowed() -> None:
    assert not list((ROOT / "datasets").rglob("*.py"))
    command = "import datasets; print(datasets.__file__); datasets.load_dataset"
    shown = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "site-packages" in shown.stdout


def test_the_packages_are_typed() -> None:
    for package in ("finetune", "adapters", "unets"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        assert (Path(spec.origin).parent / "py.typed").exists()


def test_rooms_import_downwards_and_in_no_circle() -> None:
    linter = Path(sys.executable).with_name("lint-imports")  # a process, as it resets logging
    subprocess.run(
        [linter, "--config", ROOT / "pyproject.toml", "--no-cache"], check=True, cwd=ROOT
    )


def test_no_test_imports_another() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert not module.rpartition(".")[2].startswith("test_"), f"{file} imports {module}"


def test_contributing_shows_where_every_module_is() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    folders = ("finetune", "adapters", "unets", "docs")
    modules = {f.name for p in folders for f in (ROOT / p).rglob("*.py")}
    shown = set(re.findall(r"\w+\.py", tree))
    assert modules - {"__init__.py"} == shown - {"test_losses.py"}
