"""Pictures sampled while training, so that a person sees what the curves do not say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from adapters import load_cascade
from adapters.cascade.cascade import Cascade
from adapters.cascade.load import Parts
from finetune.data.batches import shrink
from finetune.data.pictures import Picture, crop, to_tensor
from finetune.recipe.schema import Recipe
from finetune.step.stages import Stage

Samples = list[tuple[str, Image.Image]]
"""Prompts, each with its picture."""

PHOTOS = 4
"""How many of the training pictures Stage II is shown downsampled."""


@dataclass(frozen=True)
class Source:
    """What one row of validation pictures is sampled from."""

    title: str
    prompts: tuple[str, ...]
    low_res: Tensor | None
    """[N, 3, s, s] in [-1, 1], Stage II only."""
    stage_2_prompts: tuple[str, ...] | None = None
    """What Stage II is told instead of the prompts."""


@dataclass(frozen=True)
class Validation:
    """Samples the recipe's prompts from the UNet in training, always with the same seeds."""

    cascade: Cascade
    stage: Stage
    recipe: Recipe
    embeds: Mapping[str, Tensor]
    sources: tuple[Source, ...]

    def __call__(self) -> dict[str, Samples]:
        """The prompts of each source and their pictures, by the source's title."""
        samples = {source.title: self._sample(source) for source in self.sources}
        self.cascade.free_graphs()  # their memory is the training step's
        return samples

    def _sample(self, source: Source) -> Samples:
        images = self.cascade(
            source.prompts,
            stage_2_prompt=source.stage_2_prompts,
            embeds=self.embeds,
            seed=self.recipe.validation.seed,
            sampling=self.recipe.validation.sampling,
            low_res=source.low_res,
        )
        return list(zip(source.prompts, images.final, strict=True))


def prepare_validation(
    recipe: Recipe,
    stage: Stage,
    unet: UNet2DConditionModel,
    embeds: Mapping[str, Tensor],
    pictures: Sequence[Picture],
    low_res_px: int | None,
    adapters: Path,
) -> Validation | None:
    """The validation of one stage; ``None`` where the recipe names no prompts.

    Stage II upsamples samples of Stage I (fine-tuned, where this run has done so), made once, and
    downsampled training pictures.
    """
    prompts = recipe.validation.prompts
    if not prompts:
        return None
    sources = [Source("samples", prompts, None)]
    if low_res_px is not None:
        low_res = stage_1_samples(recipe, embeds, unet.device, adapters)
        sources = [
            Source("from_stage_1", prompts, low_res, recipe.validation.stage_2_prompts),
            photo_source(recipe, pictures[:PHOTOS], unet.config.sample_size, low_res_px),
        ]
    cascade = load_cascade(
        recipe.base.stage_1 if stage.number == 1 else None,
        recipe.base.stage_2 if stage.number == 2 else None,
        revision=recipe.base.revision,
        variant=recipe.base.variant,
        device=unet.device,
        parts=Parts(text_encoder=False, unets={stage.number: unet}),
    )
    return Validation(cascade, stage, recipe, embeds, tuple(sources))


def stage_1_samples(
    recipe: Recipe, embeds: Mapping[str, Tensor], device: torch.device, adapters: Path
) -> Tensor:
    """The validation prompts sampled from Stage I, [N, 3, s, s] in [-1, 1]."""
    cascade = load_cascade(
        recipe.base.stage_1,
        adapters=[adapters] if recipe.stage_1 else [],
        revision=recipe.base.revision,
        variant=recipe.base.variant,
        device=device,
        dtype=recipe.precisions_on(device),
        parts=Parts(text_encoder=False, originals="cpu"),
    )
    prompts = recipe.validation.prompts
    return cascade(
        prompts,
        embeds=embeds,
        seed=recipe.validation.seed,
        sampling=recipe.validation.sampling,
    ).low_res


def photo_source(
    recipe: Recipe, pictures: Sequence[Picture], size_px: int, low_res_px: int
) -> Source:
    """Training pictures, cropped at their centre and downsampled."""
    rng = np.random.default_rng(0)
    crops = [
        crop(picture, size_px, rng, center_shift=0.0, horizontal_flip=False) for picture in pictures
    ]
    return Source(
        "from_photos",
        tuple(picture.caption for picture in pictures),
        torch.stack([to_tensor(shrink(image, low_res_px)) for image in crops]),
    )
