"""Pictures sampled during training, which show a person more than the curves do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from adapters import load_cascade
from adapters.cascade.load import Parts
from finetune.data.batches import shrink
from finetune.data.pictures import Picture, crop, to_tensor
from finetune.recipe.schema import Base, Recipe, Validation
from finetune.run.folders import Folders
from finetune.run.trainee import Trainee
from finetune.step.stages import STAGES, Stage
from unets.memory import free_memory
from unets.precision import Precision

Kind = Literal["subject", "others", "photos"]
"""The contents of a row: validation prompts, prompts without the subject, or training pictures."""

PHOTOS = 4
"""The number of training pictures that Stage II upsamples from a downsampled copy."""


@dataclass(frozen=True)
class PromptRow:
    """A row of validation pictures: its prompts, and the pictures that Stage II upsamples."""

    title: str
    """The row's name in TensorBoard."""
    prompts: tuple[str, ...]
    kind: Kind = "subject"
    low_res: Tensor | None = None
    """The pictures to upsample, [N, 3, s, s] in [-1, 1], Stage II only."""
    stage_2_prompts: tuple[str, ...] | None = None
    """The prompts for Stage II; ``None``: the same."""


@dataclass(frozen=True)
class DrawnRow:
    """The pictures of a row."""

    row: PromptRow
    pictures: tuple[Image.Image, ...]
    low_res: Tensor | None = None
    """The pixels of Stage I's pictures, [N, 3, s, s] in [-1, 1]; in Stage I only."""

    @property
    def by_prompt(self) -> dict[str, Image.Image]:
        """The pictures by prompt."""
        return dict(zip(self.row.prompts, self.pictures, strict=True))


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

    def sample(self) -> list[DrawnRow]:
        """Sample each row."""
        samples = []
        for row in self.rows:
            pictures = self.cascade(
                row.prompts,
                stage_2_prompt=row.stage_2_prompts,
                embeds=self.embeds,
                seed=self.settings.seed,
                sampling=self.settings.sampling,
                low_res=row.low_res,
                progress="Validating",
            )
            samples.append(DrawnRow(row, tuple(pictures.final), pictures.low_res))
        self.cascade.free_graphs()  # the training step needs their memory
        return samples


def rows_of_stage_1(settings: Validation) -> list[PromptRow]:
    """Lay out the rows that Stage I draws."""
    rows = [
        PromptRow("drawn/samples", settings.prompts, stage_2_prompts=settings.stage_2_prompts),
        PromptRow("drawn/samples_of_others", settings.other_prompts, "others"),
    ]
    return [row for row in rows if row.prompts]


def sample_stage_1(
    settings: Validation,
    base: Base,
    embeds: Mapping[str, Tensor],
    precisions: Mapping[int, Precision],
    device: torch.device,
    adapters: Sequence[Path],
) -> list[PromptRow]:
    """Sample the rows of Stage I once, with its adapters, for Stage II."""
    cascade = load_cascade(
        base.stage_1,
        adapters=adapters,
        revision=base.revision,
        variant=base.variant,
        device=device,
        dtype=precisions,
        parts=Parts(text_encoder=False, originals="cpu"),  # rarely needed, as the adapter stays
    )
    rows = []
    for row in rows_of_stage_1(settings):
        pictures = cascade(
            row.prompts,
            embeds=embeds,
            seed=settings.seed,
            sampling=settings.sampling,
            progress="For validation",
        )
        title = row.title.replace("samples", "from_stage_1")
        rows.append(replace(row, title=title, low_res=pictures.low_res))
    return rows


def build_validator(
    recipe: Recipe,
    trainee: Trainee,
    embeds: Mapping[str, Tensor],
    pictures: Sequence[Picture],
) -> Validator | None:
    """Build what draws a stage's validation pictures; ``None``: the recipe has no prompts.

    Stage II enlarges what Stage I draws now, with its adapter if the recipe trains it, and the
    first of the training pictures.
    """
    settings, base, stage = recipe.validation, recipe.base, trainee.stage
    rows, unet = rows_of_stage_1(settings), trainee.unet
    if not rows:
        return None
    if stage.super_resolution:
        # its own folder, as an earlier adapter of Stage II next to it may be damaged
        trained = Folders(recipe.folder).adapters / STAGES[1].name
        adapters = [trained] if recipe.stage_1 else []
        precisions = recipe.precisions_on(unet.device)
        low_res_px = recipe.source(STAGES[1]).picture_size_px
        rows = [
            *sample_stage_1(settings, base, embeds, precisions, unet.device, adapters),
            downsample_photos(pictures, unet.config.sample_size, low_res_px),
        ]
    return Validator(settings, base, stage, unet, embeds, rows)


def enlarge(
    drawn: Sequence[DrawnRow], recipe: Recipe, embeds: Mapping[str, Tensor], device: torch.device
) -> list[DrawnRow]:
    """Enlarge what Stage I has drawn by the base's Stage II, which is loaded and freed."""
    settings, base = recipe.validation, recipe.base
    cascade = load_cascade(
        None,
        base.stage_2,
        revision=base.revision,
        variant=base.variant,
        device=device,
        dtype=recipe.precisions_on(device),
        parts=Parts(text_encoder=False),
    )
    rows = []
    for each in drawn:
        row = replace(each.row, title=each.row.title.replace("samples", "through_stage_2"))
        pictures = cascade(
            row.prompts,
            stage_2_prompt=row.stage_2_prompts,
            embeds=embeds,
            seed=settings.seed,
            sampling=settings.sampling,
            low_res=each.low_res,
            progress="Validating",
        )
        rows.append(DrawnRow(row, tuple(pictures.final)))
    cascade.free_graphs()
    del cascade
    free_memory(device)
    return rows


def downsample_photos(pictures: Sequence[Picture], size_px: int, low_res_px: int) -> PromptRow:
    """Crop the first training pictures at their centre and downsample them, for Stage II."""
    pictures, rng = pictures[:PHOTOS], np.random.default_rng(0)
    crops = [crop(each, size_px, rng, center_shift=0.0, horizontal_flip=False) for each in pictures]
    return PromptRow(
        "drawn/shrunk_photos",
        tuple(picture.caption for picture in pictures),
        "photos",
        torch.stack([to_tensor(shrink(image, low_res_px)) for image in crops]),
    )
