"""The top-level folder of pictures never stands in the way of the datasets library."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_datasets_library_is_not_shadowed() -> None:
    assert not list((ROOT / "datasets").rglob("*.py"))
    command = "import datasets; print(datasets.__file__); datasets.load_dataset"
    shown = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "site-packages" in shown.stdout


def test_the_packages_are_typed() -> None:
    for package in ("finetune", "adapters"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        assert (Path(spec.origin).parent / "py.typed").exists()
