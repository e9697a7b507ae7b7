"""Where, with what and of what measurements are."""

import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

PACKAGES = ("torch", "diffusers", "peft", "accelerate", "bitsandbytes", "transformers")


def machine() -> dict[str, str]:
    """The device, the packages and the commit."""
    on_gpu = torch.cuda.is_available()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        **{name: version(name) for name in PACKAGES},
        "commit": commit or "unknown",
    }
