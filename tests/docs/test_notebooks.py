"""The notebooks run from top to bottom on a small random cascade, with far fewer steps."""

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from adapters import AdapterSpec
from tests.builders import ROOT
from tests.builders.adapters import export, trained_unet
from tests.builders.random_cascade import RandomCascade
from tests.builders.repository import furnish

NOTEBOOKS = ROOT / "docs/notebooks"

FEWER = {
    '{"stage_1": 250, "stage_2": 50}': '{"stage_1": 2, "stage_2": 1}',
    '{"stage_1": 25, "stage_2": 10}': '{"stage_1": 1, "stage_2": 1}',
    "PICTURES = 2": "PICTURES = 1",
    '"evaluation.expected=null",': '"evaluation.expected=null", "prior.prompts=[a pizza]", '
    '"validation.loss_pictures=1",',
    "steps=25": "steps=2",
    "steps=10": "steps=1",
}
"""What the tests replace in the cells."""


def run_notebook(name: str, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder like the repository; an error in a cell is raised here."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    for cell in notebook.cells:
        for text, fewer in FEWER.items():
            cell.source = cell.source.replace(text, fewer)
    write_kernel_spec(folder / "kernels/python3", overrides={"argv": kernel_command()})
    kernels = KernelSpecManager(kernel_dirs=[str(folder / "kernels")])
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    client = NotebookClient(
        notebook,
        timeout=280,
        km=kernel,
        resources={"metadata": {"path": str(folder)}},
    )
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        client.execute(env=os.environ | environment)
    finally:  # the client ends only a kernel that it has made itself
        asyncio.run(kernel.shutdown_kernel(now=True))
    return notebook


def kernel_command() -> list[str]:
    return [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]


def outputs_of(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(str(output) for cell in notebook.cells for output in cell.get("outputs", ()))


def test_fine_tune(random_cascade: RandomCascade, tmp_path: Path) -> None:
    furnish(tmp_path, random_cascade)
    shown = outputs_of(run_notebook("fine_tune.ipynb", tmp_path))
    assert "a sks robot on a purple background" in shown
    assert "Adapters:" in shown
    assert "CLIP-I" in shown
    for stage in ("stage_1", "stage_2"):
        assert list((tmp_path / "runs/robot_notebook/adapters" / stage).glob("*.safetensors"))


def test_mix_and_merge(
    random_cascade: RandomCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnish(tmp_path, random_cascade)
    monkeypatch.chdir(tmp_path)
    for stage in (1, 2):
        base, spec = Path(f"models/if-tiny/stage_{stage}"), AdapterSpec(rank=2)
        export(trained_unet(base, spec), Path("runs/quickstart/adapters"), base, stage, spec)
    shutil.copytree(tmp_path / "runs/quickstart", tmp_path / "runs/robot")
    shown = outputs_of(run_notebook("mix_and_merge.ipynb", tmp_path))
    assert "quickstart" in shown
    assert (tmp_path / "runs/both/adapters/stage_1").is_dir()
    assert (tmp_path / "runs/merged/stage_2/unet").is_dir()


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.name)
def test_what_a_notebook_has_shown_is_left_out(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert not re.search(r"/(home|root|work|tmp)/", file.read_text(encoding="utf-8"))
