"""Estimates of the memory that a model's components take, without loading their weights."""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPConfig

from adapters.base.configurations import CONFIG
from adapters.base.guards import SafetyChecker
from adapters.base.source import CHECKER, Source
from unets.precision import dtype_of
from unets.tally import META, total_bytes

PROMPT_TOKENS = 77
"""The tokens that a prompt is padded to: ``max_length`` in diffusers' ``IFPipeline.encode_prompt``,
and the ``max_position_embeddings`` of the x4 upscaler's text encoder."""


def text_encoder_bytes(source: Source, precision: str) -> tuple[int, int]:
    """Estimate the bytes of a text encoder's weights, and of the largest one once restored.

    Encoding takes less than restoring the largest weight, as prompts are encoded one at a time.
    """
    weights = list(source.text_encoder(precision, META).state_dict().values())
    largest = max(weight.numel() for weight in weights)
    return total_bytes(weights), largest * dtype_of(precision).itemsize


def safety_checker_bytes(source: Source, dtype: torch.dtype) -> int:
    """Estimate the bytes of a stage's safety checker, which visits the stage's device."""
    if not source.has_safety_checker:
        return 0
    config = source.files.read_config(f"{CHECKER}/{CONFIG}")
    with source.files.reading(), META:
        checker = SafetyChecker(CLIPConfig.from_dict(config)).to(dtype)
    return total_bytes(checker.state_dict().values())


def drawing_inputs(
    unet: UNet2DConditionModel, pictures: int, size_px: int | None = None
) -> dict[str, Tensor]:
    """Create a UNet's inputs, without values, for pictures drawn at once and their unguided twins.

    Their side is ``size_px``, or else that of the UNet's configuration.
    """
    config, count = unet.config, 2 * pictures
    side = size_px or config.sample_size
    width = config.encoder_hid_dim or config.cross_attention_dim
    shapes = {
        "sample": (count, config.in_channels, side, side),
        "encoder_hidden_states": (count, PROMPT_TOKENS, width),
    }
    integers = {"timestep": (), "class_labels": (count,)}
    return {n: torch.empty(s, dtype=unet.dtype, device=META) for n, s in shapes.items()} | {
        n: torch.empty(s, dtype=torch.int64, device=META) for n, s in integers.items()
    }
