"""Loading a cascade."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DConditionModel

from adapters.bases import GUARDS, Source
from adapters.cascade import Cascade
from adapters.errors import UserError
from unets.loading import compute_dtype

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"]


def load_cascade(
    stage_1: str | Path | None = None,
    stage_2: str | Path | None = None,
    stage_3: str | Path | None = None,
    *,
    adapters: Sequence[str | Path] = (),
    scale: float = 1.0,
    revision: str | None = None,
    variant: str | None = None,
    device: str | torch.device = "auto",
    dtype: Precision = "auto",
    text_encoder: bool = True,
    unets: Mapping[int, UNet2DConditionModel] | None = None,
) -> Cascade:
    """Load a cascade with diffusers' own pipelines, guards and all.

    Args:
        stage_1: Stage I, a folder or a hub name; ``None``: only given pictures are upsampled.
        stage_2: Stage II.
        stage_3: the x4 upscaler. It is guarded by the modules of the stage before it, as the
            published cascade's is.
        adapters: exported folders to merge, see :meth:`Cascade.add_adapter`.
        scale: of these adapters.
        revision: the hub revision of Stage I and II.
        variant: the weights' variant of Stage I and II, such as ``fp16``.
        device: ``auto``: the GPU where there is one.
        dtype: the precision of the UNets; ``auto``: bf16 on a GPU, fp32 elsewhere. The text
            encoder of fp16 UNets is bf16, as T5-XXL overflows in fp16, and that of quantised ones
            is not quantised.
        text_encoder: whether to load the text encoder of Stage I (of Stage II where that is alone).
        unets: UNets to sample from instead of loading them, by stage; they keep their precision.

    Raises:
        UserError: where a model, an adapter or the device is not there or does not fit.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = available(device)
    if dtype == "auto":
        dtype = "fp32" if device.type == "cpu" else "bf16"
    unet_dtype = compute_dtype(dtype, device)
    text_dtype = torch.bfloat16 if unet_dtype == torch.float16 else unet_dtype
    sources = {
        number: Source(str(name), number, revision, variant)
        for number, name in ((1, stage_1), (2, stage_2))
        if name is not None
    }
    if not sources:
        raise UserError("A cascade needs Stage I, Stage II or both; name at least one model.")
    unets = {
        number: (unets or {}).get(number) or source.unet(dtype, device)
        for number, source in sources.items()
    }
    no_text = {"text_encoder": None, "tokenizer": None}
    stages = {
        number: source.pipeline(unet_dtype, **no_text, unet=unets[number]).to(device)
        for number, source in sources.items()
    }
    text = None
    if text_encoder:
        # it draws no pictures, so it has nothing to guard
        no_pictures = dict.fromkeys(("unet", *GUARDS)) | {"requires_safety_checker": False}
        text = sources[min(sources)].pipeline(text_dtype, **no_pictures).to(device)
    upscaler = None
    if stage_3 is not None:
        last = stages[max(stages)]
        upscaler = Source(str(stage_3), 3).pipeline(unet_dtype).to(device)
        guards = {name: last.components[name] for name in GUARDS}
        upscaler.register_modules(**{name: guard for name, guard in guards.items() if guard})
    names = {number: source.name for number, source in sources.items()}
    cascade = Cascade(stages, upscaler, text, names)
    for folder in adapters:
        cascade.add_adapter(folder, scale)
    return cascade


def available(name: str | torch.device) -> torch.device:
    """The device of a name, once something has been placed on it."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"The device {str(name)!r} cannot be used ({reason}); choose auto, cpu, or cuda where"
            " there is a GPU."
        ) from error
