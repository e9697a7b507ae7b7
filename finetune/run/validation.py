"""Pictures sampled during training, which show a person more than the curves do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from adapters import load_cascade
from adapters.cascade.load import Parts
from finetune.data.batches import shrink
from finetune.data.pictures import Picture, crop, to_tensor
from finetune.recipe.schema import Base, Validation
from finetune.step.stages import Stage
from unets.precision import Precision

Samples = list[tuple[str, Image.Image]]
"""Prompts, each with its picture."""

PHOTOS = 4
"""The number of training pictures that Stage II upsamples from a downsampled copy."""


@dataclass(frozen=True)
class PromptRow:
    """A row of validation pictures: its prompts, and the pictures that Stage II upsamples."""

    title: str
    prompts: tuple[str, ...]
    low_res: Tensor | None = None
    """The pictures to upsample, [N, 3, s, s] in [-1, 1], Stage II only."""
    stage_2_prompts: tuple[str, ...] | None = None
    """The prompts for Stage II; ``None``: the same."""


class Validator:
    """A cascade with the UNet in training, sampled with the same prompts and seeds each time."""

    def __init__(
        self,
        settings: Validation,
        base: Base,
        stage: Stage,
        unet: UNet2DConditionModel,
        embeds: Mapping[str, Tensor],
        rows: Sequence[PromptRow],
    ) -> None:
        self.settings, self.embeds, self.rows = settings, embeds, rows
        self.cascade = load_cascade(
            base.stage_1 if stage.number == 1 else None,
            base.stage_2 if stage.number == 2 else None,
            revision=base.revision,
            variant=base.variant,
            device=unet.device,
            parts=Parts(text_encoder=False, unets={stage.number: unet}),
        )

    def sample(self) -> dict[str, Samples]:
        """Sample each row; return the rows' prompts and pictures by title."""
        samples = {}
        for row in self.rows:
            pictures = self.cascade(
                row.prompts,
                stage_2_prompt=row.stage_2_prompts,
                embeds=self.embeds,
                seed=self.settings.seed,
                sampling=self.settings.sampling,
                low_res=row.low_res,
            )
            samples[row.title] = list(zip(row.prompts, pictures.final, strict=True))
        self.cascade.free_graphs()  # the training step needs their memory
        return samples


def sample_stage_1(
    settings: Validation,
    base: Base,
    embeds: Mapping[str, Tensor],
    precisions: Mapping[int, Precision],
    device: torch.device,
    adapters: Sequence[Path],
) -> PromptRow:
    """Sample the validation prompts once from Stage I with its adapters, for Stage II."""
    prompts = settings.prompts
    cascade = load_cascade(
        base.stage_1,
        adapters=adapters,
        revision=base.revision,
        variant=base.variant,
        device=device,
        dtype=precisions,
        parts=Parts(text_encoder=False, originals="cpu"),  # rarely needed, as the adapter stays
    )
    pictures = cascade(prompts, embeds=embeds, seed=settings.seed, sampling=settings.sampling)
    return PromptRow("from_stage_1", prompts, pictures.low_res, settings.stage_2_prompts)


def downsample_photos(pictures: Sequence[Picture], size_px: int, low_res_px: int) -> PromptRow:
    """Crop the first training pictures at their centre and downsample them, for Stage II."""
    pictures, rng = pictures[:PHOTOS], np.random.default_rng(0)
    crops = [crop(each, size_px, rng, center_shift=0.0, horizontal_flip=False) for each in pictures]
    return PromptRow(
        "from_photos",
        tuple(picture.caption for picture in pictures),
        torch.stack([to_tensor(shrink(image, low_res_px)) for image in crops]),
    )
