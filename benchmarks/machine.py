"""The common ground of all measurements: the machine, the models, options and reports."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

PACKAGES = ("torch", "diffusers", "peft", "accelerate", "bitsandbytes", "transformers")

SIZES = {1: "IF-I-XL", 2: "IF-II-L-sized", 3: "x4-upscaler"}
"""The published size of each stage's random weights, as :mod:`benchmarks.random_model` names it."""


def machine() -> dict[str, str]:
    """Describe the device, the versions of the packages, and the commit."""
    on_gpu = torch.cuda.is_available()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        **{name: version(name) for name in PACKAGES},
        "commit": commit or "unknown",
    }


def parser(description: str | None, model: str, out: str) -> argparse.ArgumentParser:
    """Build a command line with ``--model`` and ``--out``, which default to these folders."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / model, help="folder of the stages")
    parser.add_argument("--out", type=Path, default=ROOT / out, help="folder of the results")
    return parser


def prepare_models(folder: Path, stages: Iterable[int], *, whole: bool = False) -> None:
    """Make the stages that a folder lacks, with random weights of the published sizes.

    Each is made in a process of its own, to leave no memory allocated in this one.

    Args:
        folder: the parent of ``stage_1`` and so on.
        stages: their numbers.
        whole: add safety checkers, watermarkers and the whole text encoder.
    """
    for stage in stages:
        target = folder / f"stage_{stage}"
        if not (target / "model_index.json").exists():
            command = [sys.executable, "-m", "benchmarks.random_model", str(target)]
            command += ["--unet", SIZES[stage], *(["--guarded"] if whole else [])]
            command += ["--t5-xxl"] if whole and stage == 1 else []
            subprocess.run(command, cwd=ROOT, check=True)


def write_report(file: Path, *parts: str) -> str:
    """Write the machine and the parts of a report to a file, and return the text."""
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text := "\n\n".join([about, *parts]) + "\n")
    return text
