"""A look at a folder of pictures: their number, sizes and captions, and what may go wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adapters.errors import UserError, listed
from finetune.data.notes import Notes
from finetune.data.picture_folders import open_folder
from finetune.data.pictures import Picture, load_pictures
from finetune.data.rows import SURVEYED
from finetune.data.sources import has_captions
from finetune.proposal.rules import FEW_PICTURES, MANY_PICTURES
from finetune.recipe.schema import Data

THUMBNAIL_PX = 16
"""The side of the thumbnails by which pictures are compared."""

ALIKE = 3.0
"""The mean difference of two thumbnails, of 255, below which pictures are nearly the same: the
same photo saved or scaled again differs by less than 2, two photos of one scene by more than 5."""

NAMED = 4
"""The number of files that a sentence names."""


@dataclass(frozen=True)
class Survey:
    """The pictures of a folder."""

    folder: Path
    pictures: Sequence[Picture]
    sizes: Sequence[tuple[int, int]]
    """Width and height in pixels, of each picture as it is stored."""
    captioned: bool
    """True if the pictures have captions of their own."""
    notes: Sequence[str] = ()
    """Sentences on what is not read or changed."""

    @property
    def names(self) -> list[str]:
        """The names of the pictures' files."""
        return [Path(picture.source).name for picture in self.pictures]

    @property
    def captions(self) -> list[str]:
        """The distinct captions."""
        return list(dict.fromkeys(picture.caption for picture in self.pictures))

    def describe(self) -> list[tuple[str, str]]:
        """List what was found, as names and texts."""
        short = sorted(min(size) for size in self.sizes)
        spread = f"{short[0]} px" if short[0] == short[-1] else f"{short[0]} to {short[-1]} px"
        captions = "none"
        if self.captioned:
            captions = f'{len(self.captions)} different, such as "{self.captions[0]}"'
        return [
            ("pictures", f"{len(self.pictures)} in {self.folder}, the shorter side {spread}"),
            ("captions", captions),
        ]

    def find_problems(self, *, subject: bool) -> Iterator[str]:
        """Yield a sentence for each thing that may go wrong.

        Args:
            subject: one subject is taught, rather than what the captions say.
        """
        count = len(self.pictures)
        if subject and count < FEW_PICTURES:
            yield f"{count} picture(s) are few: give {FEW_PICTURES} to 8, on different backgrounds."
        if subject and count > MANY_PICTURES:
            yield (
                f"{count} pictures are many for one subject: choose the {FEW_PICTURES} to"
                f" {MANY_PICTURES} best, or caption them."
            )
        for what, pairs in self._find_pairs():
            yield (
                f"{what}: {listed(pairs, NAMED)}; each counts like another picture, so remove all"
                " but one."
            )
        yield from self.notes

    def _find_pairs(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the pairs of pictures that are the same, and that are nearly so."""
        thumbnails = [_shrink(picture.pixels) for picture in self.pictures]
        same, alike = [], []
        for one, other in combinations(range(len(thumbnails)), 2):
            pair = f"{self.names[one]} and {self.names[other]}"
            if self.pictures[one].file == self.pictures[other].file:
                same.append(pair)
            elif np.abs(thumbnails[one] - thumbnails[other]).mean() < ALIKE:
                alike.append(pair)
        yield from ((w, p) for w, p in (("The same", same), ("Nearly the same", alike)) if p)


def _shrink(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    picture = Image.fromarray(np.asarray(pixels))
    small = picture.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def survey(folder: Path, cache_dir: Path, *crops_px: int) -> Survey:
    """Read all pictures of a folder, once, into the cache that training reads them from.

    Args:
        folder: a folder or zip with pictures in it, captioned or not.
        cache_dir: the cache.
        crops_px: the sides of the crops that will be taken.

    Raises:
        UserError: if there is no such folder, it has no pictures, or one of them is damaged.
    """
    if open_folder(folder) is None:
        raise UserError(f"{folder} is not a folder: name the one with your pictures in it.")
    captioned = has_captions(folder)
    data = Data(source=str(folder), prompt=None if captioned else "none")
    notes = Notes()
    pictures = load_pictures(data, cache_dir, *crops_px, wording=SURVEYED, notes=notes)
    sizes = [picture.size for picture in pictures]
    return Survey(folder, pictures, sizes, captioned, notes.sentences)
