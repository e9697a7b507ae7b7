"""Attaching adapters: what they match, what trains, and that a fresh one changes nothing."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tests.builders.random_cascade import TEXT_WIDTH


def load_unet(folder: Path) -> UNet2DConditionModel:
    """A frozen UNet: PyTorch's choice of kernel depends on requires_grad."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    return unet.requires_grad_(False)


def unet_inputs(
    unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size, width = 16, unet.config.encoder_hid_dim
    inputs = {
        "sample": torch.randn(2, unet.config.in_channels, size, size, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, width, generator=generator),
    }
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    inputs["timestep"] = torch.tensor([3, 900])
    if unet.config.class_embed_type == "timestep":
        inputs["class_labels"] = torch.tensor([250, 7])
    return inputs


@torch.no_grad()
def output(unet: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return unet(**inputs).sample


def inputs_of(unet: UNet2DConditionModel, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    size = unet.config.sample_size
    inputs = {
        "sample": torch.randn(2, unet.config.in_channels, size, size, generator=draw),
        "timestep": torch.tensor([10, 900]),
        "encoder_hidden_states": torch.randn(2, 7, TEXT_WIDTH, generator=draw),
    }
    if unet.config.class_embed_type:
        inputs["class_labels"] = torch.tensor([5, 250])
    return inputs
