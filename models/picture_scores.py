"""Scores of pictures of the embedded world, drawn by a cascade or true, and ways to read them."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeAlias

from adapters.errors import UserError
from finetune.recipe.schema import Data
from models.world import BACKGROUNDS, parse_caption

if TYPE_CHECKING:
    from PIL import Image

    from finetune.evaluation.metrics import ClipScorer

PICTURE_PX = 128
"""The size of the embedded cascade's pictures."""

Scores: TypeAlias = dict[str, float]
"""Scores by their names in `truth.ROWS`; those of other prompts only if there are some."""


def render_true(
    captions: Sequence[str], count: int, seed: int, size_px: int = PICTURE_PX
) -> "list[Image.Image]":
    """Draw captions with the world's own renderer: `count` pictures of each, one after another.

    Places are random, and so is the background of a caption that names none.

    Args:
        captions: captions of this world, without an identifier.
        count: the number of pictures of each.
        seed: the seed of places and backgrounds.
        size_px: the picture size.

    Raises:
        UserError: if a caption is not of this world, or its object's sprite is not stored.
    """
    import torch

    from models.scenes import draw_scenes, read_sprites

    scenes = [parse_caption(text) for text in captions for _ in range(count)]
    chance = torch.Generator().manual_seed(seed)
    backgrounds = torch.randint(len(BACKGROUNDS), (len(scenes),), generator=chance)
    for index, (_, named) in enumerate(scenes):
        if named is not None:
            backgrounds[index] = named
    return draw_scenes(read_sprites([thing for thing, _ in scenes]), backgrounds, size_px, seed)


def score_shapes(pictures: "Sequence[Image.Image]", captions: Sequence[str]) -> list[float]:
    """Compute the SSIM of each picture with the sprite of the object that its caption names.

    Raises:
        UserError: if a caption is not of this world, or its object's sprite is not stored.
    """
    from models.scenes import read_sprites
    from models.shape import shape_score

    sprites = read_sprites([parse_caption(text)[0] for text in captions])
    return [
        shape_score([picture], sprite)[0] for picture, sprite in zip(pictures, sprites, strict=True)
    ]


def score(
    pictures: "Sequence[Image.Image]",
    captions: Sequence[str],
    subject: str,
    photos: "Sequence[Image.Image]",
    scorer: "ClipScorer",
    *,
    shapes: bool = True,
) -> Scores:
    """Score pictures of the subject and of other things.

    Args:
        pictures: the pictures, drawn by a cascade or true.
        captions: the caption of each, without an identifier.
        subject: the subject's name; pictures whose captions name another object are the others.
        photos: real pictures of the subject.
        scorer: the CLIP model.
        shapes: score the shapes too, which takes longest.

    Raises:
        UserError: if no caption names the subject.
    """
    from finetune.evaluation.metrics import clip_i, clip_t

    mine = find_subject(captions, subject)
    others = [i for i in range(len(captions)) if i not in mine]
    seen, read = scorer.images(pictures), scorer.texts(captions)
    scores = {
        "clip_i": clip_i(seen[mine], scorer.images(photos)),
        "clip_t": clip_t(seen[mine], read[mine]),
    }
    if others:
        scores["clip_t_others"] = clip_t(seen[others], read[others])
    if shapes:
        matches = score_shapes(pictures, captions)
        scores["shape"] = fmean(matches[i] for i in mine)
        if others:
            scores["shape_others"] = fmean(matches[i] for i in others)
    return scores


def find_subject(captions: Sequence[str], subject: str) -> list[int]:
    """Find the places of the captions that name the subject.

    Raises:
        UserError: if none does, or a caption is not of this world.
    """
    thing, _ = parse_caption(subject)
    mine = [i for i, text in enumerate(captions) if parse_caption(text)[0] == thing]
    if not mine:
        raise UserError(f"No picture is of {subject!r}, the subject: draw some of its prompts.")
    return mine


def read_drawn(folder: Path, cache: Path, size_px: int) -> "tuple[list[Image.Image], list[str]]":
    """Read a folder's pictures and prompts: its captions, or else the records in saved pictures.

    Raises:
        UserError: if the folder has no pictures, or they have no prompts.
    """
    from PIL import Image

    from adapters import read_picture_info
    from adapters.cascade.results import SHEET
    from finetune.data.sources import has_captions

    if has_captions(folder):
        return read_captioned(Data(source=str(folder)), cache, size_px)
    records = {
        file: read_picture_info(file) for file in sorted(folder.glob("*.png")) if file.name != SHEET
    }
    if not records:
        raise UserError(f"There are no pictures in {folder}: name a folder of captioned ones.")
    last = max(info.stage for info in records.values())
    kept = {file: info for file, info in records.items() if info.stage == last}
    return [Image.open(file) for file in kept], [info.prompts[1] for info in kept.values()]


def read_captioned(data: Data, cache: Path, size_px: int) -> "tuple[list[Image.Image], list[str]]":
    """Read a dataset's pictures, cropped to squares, and their captions."""
    import numpy as np

    from finetune.data.pictures import crop, load_pictures

    read, rng = load_pictures(data, cache, size_px), np.random.default_rng(0)
    squares = [
        crop(picture, size_px, rng, center_shift=0.0, horizontal_flip=False) for picture in read
    ]
    return squares, [picture.caption for picture in read]
