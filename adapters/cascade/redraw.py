"""Drawing from given pictures instead of from noise alone: image-to-image and inpainting."""

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from diffusers import (
    DiffusionPipeline,
    IFImg2ImgPipeline,
    IFImg2ImgSuperResolutionPipeline,
    IFInpaintingPipeline,
    IFInpaintingSuperResolutionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
)
from PIL import Image

from adapters.arguments import STAGES, Scale
from adapters.cascade.sampling import Sampling, StageSampling
from adapters.errors import UserError
from adapters.pictures.reading import read_mask, read_picture, to_mask, to_rgb

Given: TypeAlias = Image.Image | str | Path | Sequence[Image.Image | str | Path]
"""A picture or its file, or several of them."""

Way: TypeAlias = Literal["text", "img2img", "inpaint"]
"""The kind of drawing: from text alone, from a picture, or in its masked part."""


@dataclass(frozen=True)
class Drawing:
    """Diffusers' pipelines for one way of drawing, and their defaults."""

    pipelines: Mapping[int, type[DiffusionPipeline]]
    """The pipelines of Stage I and II."""
    sampling: Sampling
    """The pipelines' default settings."""
    strength: Mapping[int, float] = field(default_factory=dict)
    """The pipelines' default strength, by stage."""


WAYS: Mapping[Way, Drawing] = MappingProxyType(
    {
        "text": Drawing({1: IFPipeline, 2: IFSuperResolutionPipeline}, Sampling()),
        "img2img": Drawing(
            {1: IFImg2ImgPipeline, 2: IFImg2ImgSuperResolutionPipeline},
            Sampling(stage_1=StageSampling(steps=80, guidance=10.0)),
            {1: 0.7, 2: 0.8},
        ),
        "inpaint": Drawing(
            {1: IFInpaintingPipeline, 2: IFInpaintingSuperResolutionPipeline},
            Sampling(
                stage_1=StageSampling(steps=50),
                stage_2=StageSampling(steps=100, noise_level=0),
            ),
            {1: 1.0, 2: 0.8},
        ),
    }
)
"""Diffusers' own pipelines for each way of drawing, with their defaults."""

LONGEST_SIDE = 4
"""The longer side of a picture to start from, at most, in multiples of the shorter one: what is
drawn from it has the same form."""

PAINTED = 128
"""The level from which a mask counts as white, as in the pipelines."""

ORIGINAL = {1: "image", 2: "original_image"}
"""The argument of a stage's pipeline for the picture to start from."""


@dataclass(frozen=True)
class Redraw:
    """Pictures to start from, and how much to change them; built by :meth:`of`.

    Each stage's pipeline resizes them to its own size: the shorter side becomes that of its
    pictures, the longer side a multiple of 8 px.
    """

    way: Way
    """``img2img``, or ``inpaint`` if there are masks."""
    pictures: tuple[Image.Image, ...]
    """Pictures in RGB, all of one size."""
    masks: tuple[Image.Image, ...]
    """One mask for each picture, of its size, or none; white is drawn again, black stays."""
    strength: Mapping[int, float]
    """The share of its denoising steps that Stage I and II take."""

    @classmethod
    def of(
        cls, pictures: Given, masks: Given | None = None, strength: Scale | None = None
    ) -> "Redraw":
        """Read one or several pictures, and one mask for all or one for each.

        Args:
            pictures: pictures or their files, in any mode; transparent areas become white.
            masks: pictures of the same size; ``None``: everything is drawn again.
            strength: above 0 up to 1, in all stages or by stage; ``None``: the pipelines' own.

        Raises:
            UserError: if one is not a picture, or too long, sizes differ, a mask has no white, or
                the strength is out of range.
        """
        images = read_pictures(pictures, "A picture to start from")
        given = () if masks is None else _list_given(masks)
        covers = tuple(_read(each, "A mask", read_mask, to_mask) for each in given)
        if len(covers) == 1:
            covers *= len(images)
        if masks is not None and len(covers) != len(images):
            raise UserError(
                f"The masks must be one for all pictures, or one for each of the {len(images)} (got"
                f" {len(covers)})."
            )
        sizes = dict.fromkeys(image.size for image in images + covers)
        if len(sizes) > 1:
            found = ", ".join(f"{width} x {height}" for width, height in sizes)
            raise UserError(
                "Pictures to start from and their masks must have one size (found"
                f" {found} px); resize them, or draw them one by one."
            )
        _check_form(images)
        _check_masks(covers)
        way: Way = "img2img" if masks is None else "inpaint"
        return cls(way, images, covers, {**WAYS[way].strength, **_shares(strength)})

    def __len__(self) -> int:
        return len(self.pictures)

    def take(self, rows: Iterable[int]) -> "Redraw":
        """Select rows, in the order given."""
        kept = list(rows)
        pictures, masks = (
            [each[row] for row in kept if each] for each in (self.pictures, self.masks)
        )
        return replace(self, pictures=tuple(pictures), masks=tuple(masks))

    def arguments(self, stage: int) -> dict[str, Any]:
        """Make the arguments of Stage I's or II's pipeline."""
        arguments = {ORIGINAL[stage]: list(self.pictures), "strength": self.strength[stage]}
        return arguments | ({"mask_image": list(self.masks)} if self.masks else {})


def sharing(pipe: DiffusionPipeline, kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    """Make a pipeline of another kind that shares a pipeline's modules, guards and schedulers."""
    if isinstance(pipe, kind):
        return pipe
    required = pipe.config.requires_safety_checker
    return kind(**pipe.components, requires_safety_checker=required)


def read_pictures(given: Given, what: str) -> tuple[Image.Image, ...]:
    """Read one or several pictures in RGB, given themselves or as files.

    Args:
        given: pictures or their files, in any mode; transparent areas become white.
        what: their name in messages, with its article.

    Raises:
        UserError: if one is not a picture.
    """
    return tuple(_read(each, what, read_picture, to_rgb) for each in _list_given(given))


def _list_given(given: Given) -> Sequence[object]:
    return given if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def _read(
    given: object,
    what: str,
    read_file: Callable[[str | Path], Image.Image],
    convert: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    if isinstance(given, str | Path):
        return read_file(given)
    if not isinstance(given, Image.Image):
        raise UserError(
            f"{what} must be a PIL image or a file (got a {type(given).__name__}); convert it."
        )
    return convert(given)


def _check_form(pictures: Sequence[Image.Image]) -> None:
    """Check that no picture is so long that what is drawn from it would take all memory."""
    for width, height in (picture.size for picture in pictures):
        if max(width, height) > LONGEST_SIDE * min(width, height):
            raise UserError(
                f"A picture to start from may be at most {LONGEST_SIDE} times as long as it is wide"
                f" (found {width} x {height} px); crop it."
            )


def _check_masks(masks: Sequence[Image.Image]) -> None:
    """Check that every mask has something to draw again."""
    for mask in masks:
        if np.asarray(mask.convert("L")).max(initial=0) < PAINTED:
            raise UserError(
                "A mask must have something white (found none), or nothing is drawn again; paint"
                " white what is to change."
            )


def _shares(strength: Scale | None) -> Mapping[int, float]:
    """Check a strength, and arrange it by stage."""
    if strength is None:
        return {}
    shares = strength if isinstance(strength, Mapping) else dict.fromkeys(STAGES, strength)
    for stage, share in shares.items():
        if stage not in STAGES or not isinstance(share, numbers.Real) or not 0 < share <= 1:
            raise UserError(
                "The strength must be above 0 and at most 1, in all stages or for Stage"
                f" {' and '.join(map(str, STAGES))} (got {strength!r})."
            )
    return {stage: float(share) for stage, share in shares.items()}
