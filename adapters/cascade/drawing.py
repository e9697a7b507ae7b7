"""Drawing with one stage, batch by batch, and finishing its pictures as its pipeline does.

Shapes: N pictures, S the stage's picture size, s that of the stage below. Pixels are in [-1, 1].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from diffusers import (
    DiffusionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

from adapters.cascade.conditioning import Conditioning
from adapters.cascade.redraw import WAYS, sharing
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError
from adapters.progress import is_watched
from unets.graphs import Replayed

Stage: TypeAlias = "IFPipeline | IFSuperResolutionPipeline"


@dataclass(frozen=True)
class Drawn:
    """The pictures of one stage."""

    pictures: tuple[Image.Image, ...]
    flagged: tuple[bool, ...]
    """True for each picture that a safety checker has blackened."""
    pixels: Tensor | None = None
    """[N, 3, S, S] on the CPU, before quantisation and watermark; ``None`` for Stage III."""


@dataclass(frozen=True)
class Request:
    """A drawing request for one stage: conditioning, settings, and pictures to enlarge."""

    stage: int
    conditioning: Conditioning
    sampling: Sampling
    below: Tensor | None
    """[N, 3, s, s], the pictures to enlarge; ``None`` for Stage I."""
    progress: bool | str
    """Show a progress bar for each batch; a text: show it before the bar's name."""

    def batches(self) -> Iterator["Request"]:
        """Split the request into batches of ``sampling.batch_size`` pictures."""
        count, size = len(self.conditioning), self.sampling.batch_size
        for rows in (slice(start, start + size) for start in range(0, count, size)):
            below = None if self.below is None else self.below[rows]
            yield replace(self, conditioning=self.conditioning[rows], below=below)

    def arguments(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Make the arguments of the stage's pipeline, and set up its progress bar.

        Each picture has a generator, on the CPU so that every device draws the same.
        """
        name, hidden = f"Stage {self.stage}", not (self.progress and is_watched())
        title = f"{self.progress}, {name}" if isinstance(self.progress, str) else name
        pipe.set_progress_bar_config(desc=title, disable=hidden, leave=False)
        seeds = self.conditioning.seeds
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        below = {} if self.below is None else {"image": self.below}
        text = self.conditioning.arguments(self.stage)
        return below | text | self.sampling.arguments(self.stage) | {"generator": generators}


def draw(pipe: Stage, request: Request, recorded: Replayed[Tensor]) -> Drawn:
    """Draw with Stage I or II by its UNet's recorded forward pass.

    From given pictures, another pipeline over the same modules draws.

    Raises:
        UserError: if what is drawn is not finite.
    """
    own = sharing(pipe, WAYS[request.conditioning.way].pipelines[request.stage])
    pixels: list[Tensor] = []
    pictures: list[Image.Image] = []
    flags: list[bool] = []
    with replaying(pipe.unet, recorded):
        for batch in request.batches():
            drawn = own(**batch.arguments(own), output_type="pt").images
            _check_finite(request.stage, drawn)
            finished, flagged = finish(pipe, drawn)
            pixels.append(drawn.cpu())
            pictures += finished
            flags += flagged
    return Drawn(tuple(pictures), tuple(flags), torch.cat(pixels))


def _check_finite(stage: int, pixels: Tensor) -> None:
    """Raise a UserError if a stage has drawn what are no numbers, which would be shown as black."""
    if not pixels.isfinite().all():
        raise UserError(
            f"Stage {'I' * stage} drew values that are NaN or infinite; lower the guidance or the"
            " scales of adapters, or choose the precision bf16 or fp32."
        )


def upscale(pipe: StableDiffusionUpscalePipeline, request: Request) -> Drawn:
    """Draw with Stage III, whose pipeline takes pictures in [0, 1] and applies its own guards."""
    assert request.below is not None
    pictures: list[Image.Image] = []
    flags: list[bool] = []
    for batch in replace(request, below=(request.below / 2 + 0.5).clamp(0, 1)).batches():
        result = pipe(**batch.arguments(pipe))
        pictures += result.images
        flags += result.nsfw_content_detected or [False] * len(result.images)
    return Drawn(tuple(pictures), tuple(flags))


def finish(pipe: Stage, pixels: Tensor) -> tuple[list[Image.Image], list[bool]]:
    """Finish pictures as the pipeline does: run its safety checker, then its watermarker.

    These are steps 8 to 11 of ``IFPipeline.__call__``, done there only for PIL output. Returns the
    pictures of pixels [N, 3, S, S], and a flag for each, True if it was blackened.
    """
    images = (pixels / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
    dtype = pipe.unet.dtype if pipe.safety_checker is None else pipe.safety_checker.dtype
    images, nsfw, watermarked = pipe.run_safety_checker(images, pixels.device, dtype)
    pictures = pipe.numpy_to_pil(images)
    if pipe.watermarker is not None:
        pipe.watermarker.apply_watermark(pictures, pipe.unet.config.sample_size)
    none = [False] * len(pictures)
    flags = [one or two for one, two in zip(nsfw or none, watermarked or none, strict=True)]
    return pictures, flags


@contextmanager
def replaying(unet: UNet2DConditionModel, recorded: Replayed[Tensor]) -> Iterator[None]:
    """Draw by a UNet's recorded forward pass, as IF's pipelines call it, without dropout."""
    training = unet.training

    def forward(sample: Tensor, timestep: Tensor, **inputs: Any) -> tuple[Tensor]:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        return (recorded(sample=sample, timestep=timestep, **tensors),)

    unet.eval()
    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
        unet.train(training)
