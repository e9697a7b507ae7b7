"""A look at a folder of pictures: their number, sizes and captions, and what may go wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adapters.errors import UserError, listed
from finetune.data.pictures import Picture, load_pictures
from finetune.data.sources import has_captions
from finetune.proposal.rules import FEW_PICTURES, LARGEST_ASPECT, MANY_PICTURES
from finetune.recipe.schema import Data

THUMBNAIL_PX = 16
"""The side of the thumbnails by which pictures are compared."""

ALIKE = 3.0
"""The mean difference of two thumbnails, of 255, below which pictures are nearly the same: the
same photo saved or scaled again differs by less than 2, two photos of one scene by more than 5."""

NAMED = 4
"""The number of files that a sentence names."""

NOT_PICTURES = {".txt", ".json", ".jsonl", ".csv", ".md"}
"""The endings of files beside pictures about which nothing is said."""


@dataclass(frozen=True)
class Survey:
    """The pictures of a folder."""

    folder: Path
    pictures: Sequence[Picture]
    sizes: Sequence[tuple[int, int]]
    """Width and height in pixels, of each picture as it is stored."""
    captioned: bool
    """True if the pictures have captions of their own."""
    skipped: Sequence[str] = ()
    """The names of files that are no pictures."""

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

    def find_problems(self, size_px: int, *, subject: bool) -> Iterator[str]:
        """Yield a sentence for each thing that may go wrong.

        Args:
            size_px: the side of the largest crops.
            subject: one subject is taught, rather than what the captions say.
        """
        named = dict(zip(self.names, self.sizes, strict=True))
        count = len(named)
        if subject and count < FEW_PICTURES:
            yield f"{count} picture(s) are few: give {FEW_PICTURES} to 8, on different backgrounds."
        if subject and count > MANY_PICTURES:
            yield (
                f"{count} pictures are many for one subject: choose the {FEW_PICTURES} to"
                f" {MANY_PICTURES} best, or caption them."
            )
        if small := [name for name, size in named.items() if min(size) < size_px]:
            yield (
                f"{_count(small, 'is', 'are')} smaller than {size_px} px on the shorter side, and"
                f" would teach blur: {listed(small, NAMED)}."
            )
        long = [n for n, size in named.items() if max(size) > LARGEST_ASPECT * min(size)]
        if long:
            yield (
                f"{_count(long, 'is', 'are')} more than {LARGEST_ASPECT:g} times as long as wide,"
                f" and the square crop loses the rest: {listed(long, NAMED)}."
            )
        for what, pairs in self._find_pairs():
            yield (
                f"{what}: {listed(pairs, NAMED)}; each counts like another picture, so remove all"
                " but one."
            )
        if self.skipped:
            yield f"Not read, as they are no pictures: {listed(self.skipped, NAMED)}."

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


def _count(names: Sequence[str], one: str, several: str) -> str:
    return f"1 picture {one}" if len(names) == 1 else f"{len(names)} pictures {several}"


def _shrink(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    picture = Image.fromarray(np.asarray(pixels))
    small = picture.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def survey(folder: Path, cache_dir: Path, *crops_px: int) -> Survey:
    """Read all pictures of a folder, once, into the cache that training reads them from.

    Args:
        folder: a folder with pictures in it, captioned or not.
        cache_dir: the cache.
        crops_px: the sides of the crops that will be taken.

    Raises:
        UserError: if there is no such folder, it has no pictures, or one of them is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the one with your pictures in it.")
    captioned = has_captions(folder)
    data = Data(source=str(folder), prompt=None if captioned else "none")
    pictures = load_pictures(data, cache_dir, *crops_px)
    sizes = []
    for picture in pictures:
        with Image.open(picture.source) as image:
            sizes.append(image.size)
    read = {Path(picture.source).name for picture in pictures}
    files = (file for file in sorted(folder.iterdir()) if file.is_file())
    skipped = [
        file.name
        for file in files
        if file.name not in read
        and file.suffix.lower() not in NOT_PICTURES
        and not file.name.startswith(".")
    ]
    return Survey(folder, pictures, sizes, captioned, skipped)
