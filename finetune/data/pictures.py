"""Pictures: decoded once, cropped as IF's training pictures were.

A picture is decoded into 8-bit RGB arrays in the cache, named by the hash of its file: a large
picture is kept once for each size of crop, reduced. The arrays are mapped into memory, so that a
step reads no more of them than its crop. Those that are damaged are decoded again.
"""

import hashlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from adapters.pictures.reading import UnsuitableError, find_oddities, open_picture, to_rgb
from adapters.progress import Bar
from finetune.data.kept_arrays import is_whole, map_array, save_array
from finetune.data.notes import Notes
from finetune.data.rows import TRAINING, Wording
from finetune.data.sources import open_source
from finetune.recipe.schema import Data

SPARE_RESOLUTION = 4
"""The least ratio of a reduced picture's short side to the crop's side."""

SMALLEST_PX = 8
"""The least width and height of a picture."""

LONGEST_ASPECT = 2
"""The ratio of a picture's sides above which it is said that most of it is cropped away."""

DECODING = 2
"""The version of :func:`decode`, so that pictures decoded by another one are decoded again."""


@dataclass(frozen=True)
class Picture:
    """A captioned picture with its pixels in the cache."""

    file: Path
    """The ``.npy`` file of the decoded picture in the cache, for the largest crops."""
    caption: str
    source: str
    """The picture's origin: its path, or the dataset and row."""
    reduced: Mapping[int, Path] = field(default_factory=dict)
    """The files for smaller crops, by the crop's side in pixels."""
    digest: str = ""
    """The SHA-256 of the file that it was decoded from."""
    size: tuple[int, int] = (0, 0)
    """The width and height in pixels of that file's picture, as it is stored."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """RGB pixels [H, W, 3] for the largest crops, mapped from the cache and read-only."""
        return map_array(self.file)

    def pixels_for(self, size_px: int) -> NDArray[np.uint8]:
        """Return the pixels that crops of a size are taken from, whatever other sizes there are."""
        # mapped on every access: a map keeps its file open, and the number of open files is limited
        return map_array(self.reduced.get(size_px, self.file))


def load_pictures(
    data: Data,
    cache_dir: Path,
    *crops_px: int,
    limit: int | None = None,
    wording: Wording = TRAINING,
    notes: Notes | None = None,
) -> list[Picture]:
    """Load the pictures of a recipe, each decoded once and kept in the cache for later runs.

    What is not read of the source and its pictures, or is changed, is printed, or else noted.

    Args:
        data: a folder or zip of pictures captioned by one prompt for all, by ``metadata.jsonl`` or
            by a ``.txt`` file next to each; a folder written by ``save_to_disk``; or anything that
            ``datasets.load_dataset`` takes.
        cache_dir: the recipe's cache.
        crops_px: the sides of the crops that will be taken; far larger pictures are cached once
            for each, reduced.
        limit: the number of pictures to read, from the first on; ``None``: all.
        wording: the setting that names the source, for messages.
        notes: collects what is not read, instead of printing it.

    Raises:
        UserError: if the source, its columns, a caption or a picture is missing or damaged.
    """
    rows = open_source(data, cache_dir, wording, notes)
    captions = rows.read_captions()

    def load(row: int) -> tuple[Picture, list[str]]:
        source, content = rows.read_picture(row)
        digest = hashlib.sha256(content).hexdigest()
        place = cache_dir / "pictures" / f"{digest}-{DECODING}"
        with open_picture(source, content) as image:
            check_size(image)
            oddities = [*find_oddities(image), *find_changes(image, max(crops_px))]
            files = _cache_decoded(image, place, crops_px)
            size = image.size
        picture = Picture(files.pop(max(crops_px)), captions[row], source, files, digest, size)
        return picture, oddities

    numbers = range(len(rows))[:limit]
    # Pillow warns of what it can do without in a file
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        loaded = list(Bar(pool.map(load, numbers), "Reading pictures", len(numbers), delay=2))
    for picture, oddities in loaded:
        for oddity in oddities:
            rows.notes.add(oddity, picture.source)
    if notes is None:
        rows.notes.say()
    return [picture for picture, _ in loaded]


def check_size(image: Image.Image) -> None:
    """Raise an UnsuitableError if a picture is too small to show anything."""
    width, height = image.size
    if min(width, height) < SMALLEST_PX:
        raise UnsuitableError(
            f"A picture must have at least {SMALLEST_PX} px on each side (found {width} x"
            f" {height}); replace or remove it."
        )


def find_changes(image: Image.Image, size_px: int) -> list[str]:
    """List what the largest crop does to a picture, each as the beginning of a sentence."""
    short, long = sorted(image.size)
    changes = []
    if short < size_px:
        changes.append(f"Smaller than {size_px} px, and enlarged, which teaches blur:")
    if long > LONGEST_ASPECT * short:
        changes.append(
            f"More than {LONGEST_ASPECT} times as long as wide, and cropped to a square:"
        )
    return changes


def crop(
    picture: Picture,
    size_px: int,
    rng: np.random.Generator,
    *,
    center_shift: float,
    horizontal_flip: bool,
) -> Image.Image:
    """Crop a square of [size_px, size_px], augmented as IF's pictures were (its model cards).

    The crop is the largest square that fits. Its centre is shifted along the longer side,
    uniformly by up to ``center_shift`` of the crop's side and never out of the picture, so a
    square picture is taken whole. It is resized with Pillow's BICUBIC and ``reducing_gap=None``.

    Args:
        picture: the picture to crop.
        size_px: the side of the result.
        rng: draws the shift and the flip, always two numbers.
        center_shift: the largest shift, as a fraction of the crop's side; 0: the centre.
        horizontal_flip: mirror half of the pictures, at random.
    """
    shift, flip = rng.uniform(-1, 1), rng.random() < 0.5
    pixels = picture.pixels_for(size_px)
    height, width = pixels.shape[:2]
    side, margin = min(height, width), abs(height - width) / 2
    start = round(margin + shift * min(center_shift * side, margin))
    left, top = (start, 0) if width > height else (0, start)
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    image = square.resize((size_px, size_px), Image.Resampling.BICUBIC, reducing_gap=None)
    return ImageOps.mirror(image) if horizontal_flip and flip else image


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB picture to [3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _cache_decoded(image: Image.Image, place: Path, crops_px: Collection[int]) -> dict[int, Path]:
    """Return the cached file for each size of crop; decode the picture if one is not whole."""
    side = min(image.size)
    reductions = {px: max(side // (SPARE_RESOLUTION * px), 1) for px in crops_px}
    files = {r: place.with_name(f"{place.name}-{r}.npy") for r in reductions.values()}
    if missing := [r for r, file in files.items() if not is_whole(file)]:
        for reduction, pixels in zip(missing, decode(image, missing), strict=True):
            save_array(files[reduction], pixels)
    return {px: files[reduction] for px, reduction in reductions.items()}


def decode(image: Image.Image, reductions: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Decode a picture, turn it upright, flatten it on white, and average it over boxes.

    Args:
        image: the opened file.
        reductions: the sides of the square boxes in pixels; boxes that the right or lower edge
            would cut are left out.

    Returns:
        [H, W, 3] RGB for each reduction.
    """
    image = to_rgb(image)

    def reduce(reduction: int) -> NDArray[np.uint8]:
        width, height = (side - side % reduction for side in image.size)
        return np.asarray(image.reduce(reduction, (0, 0, width, height)))

    return [reduce(reduction) for reduction in reductions]
