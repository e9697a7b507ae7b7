"""The pictures that a cascade has drawn, and how a pipeline finishes them.

Shapes: N pictures, S a stage's picture size, s that of Stage I. Pixels are in [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class CascadeImages:
    """The pictures of N samples; a stage that was not run has none."""

    stage_1: tuple[Image.Image, ...]
    stage_2: tuple[Image.Image, ...]
    stage_3: tuple[Image.Image, ...]
    prompts: tuple[str, ...]
    """The prompt of each picture; empty where only embeddings were given."""
    seeds: tuple[int, ...]
    """The seed of each picture."""
    low_res: Tensor
    """[N, 3, s, s] float32 on the CPU in [-1, 1]: Stage I's pictures before quantisation."""
    flagged: tuple[bool, ...]
    """Whether a safety checker has blackened the picture, in any stage."""

    @property
    def final(self) -> tuple[Image.Image, ...]:
        """The pictures of the last stage that was run."""
        return self.stage_3 or self.stage_2 or self.stage_1


def finish(
    pipe: "IFPipeline | IFSuperResolutionPipeline", pixels: Tensor
) -> tuple[tuple[Image.Image, ...], list[bool]]:
    """Pictures as the pipeline finishes them: checked by its safety checker, then watermarked.

    Steps 8 to 11 of ``IFPipeline.__call__``, which it takes for ``output_type="pil"`` only.

    Args:
        pipe: the stage's pipeline.
        pixels: [N, 3, S, S] in [-1, 1].

    Returns:
        The pictures, and which of them were blackened.
    """
    images = (pixels / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
    dtype = pipe.unet.dtype if pipe.safety_checker is None else pipe.safety_checker.dtype
    images, nsfw, watermarked = pipe.run_safety_checker(images, pixels.device, dtype)
    pictures = pipe.numpy_to_pil(images)
    if pipe.watermarker is not None:
        pipe.watermarker.apply_watermark(pictures, pipe.unet.config.sample_size)
    none = [False] * len(pictures)
    flags = [one or two for one, two in zip(nsfw or none, watermarked or none, strict=True)]
    return tuple(pictures), flags


def joined(parts: Sequence[CascadeImages]) -> CascadeImages:
    """The pictures of several batches as one result."""

    def together(name: str) -> tuple[Any, ...]:
        return tuple(item for part in parts for item in vars(part)[name])

    tuples = ("stage_1", "stage_2", "stage_3", "prompts", "seeds", "flagged")
    low_res = torch.cat([part.low_res for part in parts])
    return CascadeImages(**{name: together(name) for name in tuples}, low_res=low_res)
