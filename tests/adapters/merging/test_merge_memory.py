"""Merging holds the weight at work, whatever the size of the model and its shards."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from tests.builders import ROOT
from tests.builders.random_cascade import UNET, RandomCascade

MB = 1_000_000

MERGE = """
from pathlib import Path
import adapters.merging.merged_model
from adapters.errors import quiet_libraries
from adapters.merge import main

quiet_libraries()  # imports what every command does, which is not counted

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

before = peak()
main()
print(peak() - before)
"""


def bytes_held(*arguments: object) -> int:
    """By how much merging raises the largest resident memory of its process."""
    command = [sys.executable, "-c", MERGE, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def large_base(random_cascade: RandomCascade, folder: Path) -> dict[str, Tensor]:
    """A model of a few hundred megabytes, deep rather than wide; returns its UNet's shapes."""
    shutil.copytree(random_cascade.stage_1, folder, ignore=lambda *_: ["unet"])
    sizes = {"block_out_channels": (192, 384), "cross_attention_dim": 64, "layers_per_block": 6}
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=16, in_channels=3, out_channels=6, **UNET | sizes)
    unet.save_config(folder / "unet")
    shapes: dict[str, Tensor] = unet.state_dict()
    weights = {name: torch.full(shape.shape, 0.01) for name, shape in shapes.items()}
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return shapes


def test_no_more_than_a_few_weights_are_held(random_cascade: RandomCascade, tmp_path: Path) -> None:
    shapes = large_base(random_cascade, tmp_path / "base")
    tensors = {}
    for name, weight in shapes.items():
        if re.search(r"(conv\d|to_q|add_k_proj)\.weight$", name):
            module, ones = name.removesuffix(".weight"), [1] * (weight.dim() - 2)
            tensors[f"{module}.lora_A.weight"] = torch.rand(4, *weight.shape[1:])
            tensors[f"{module}.lora_B.weight"] = torch.rand(len(weight), 4, *ones)
    save_file(tensors, tmp_path / "adapter.safetensors")
    whole, largest = (f(weight.nbytes for weight in shapes.values()) for f in (sum, max))
    out = tmp_path / "merged"
    held = bytes_held(tmp_path / "adapter.safetensors", "--base", tmp_path / "base", "--out", out)
    assert len(list((out / "unet").glob("*.safetensors"))) == 1
    margin = 6 * largest + 40 * MB  # PEFT's copies of a weight, and the interpreter's own
    assert whole > 2 * margin
    assert held < margin
