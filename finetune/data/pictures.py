"""Pictures: decoded once, cropped as IF's training pictures were.

A picture is decoded into 8-bit RGB arrays in the cache, named by the hash of its file: a large
picture is kept once for each size of crop, reduced. The arrays are mapped into memory, so that a
step reads no more of them than its crop. Those that are damaged are decoded again.
"""

import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from adapters.errors import UserError
from adapters.pictures.reading import DECODING_ERRORS, to_rgb
from adapters.progress import Bar
from finetune.data.kept_arrays import is_whole, map_array, save_array
from finetune.data.sources import open_source, read_captions, read_content, select_pictures
from finetune.recipe.schema import Data

SPARE_RESOLUTION = 4
"""The least ratio of a reduced picture's short side to the crop's side."""


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

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """RGB pixels [H, W, 3] for the largest crops, mapped from the cache and read-only."""
        return map_array(self.file)

    def pixels_for(self, size_px: int) -> NDArray[np.uint8]:
        """Return the pixels that crops of a size are taken from, whatever other sizes there are."""
        # mapped on every access: a map keeps its file open, and the number of open files is limited
        return map_array(self.reduced.get(size_px, self.file))


def load_pictures(
    data: Data, cache_dir: Path, *crops_px: int, limit: int | None = None
) -> list[Picture]:
    """Load the pictures of a recipe, each decoded once and kept in the cache for later runs.

    Args:
        data: a folder of pictures captioned by one prompt for all, by ``metadata.jsonl`` or by a
            ``.txt`` file next to each; a folder written by ``save_to_disk``; or anything that
            ``datasets.load_dataset`` takes.
        cache_dir: the recipe's cache.
        crops_px: the sides of the crops that will be taken; far larger pictures are cached once
            for each, reduced.
        limit: the number of pictures to read, from the first on; ``None``: all.

    Raises:
        UserError: if the source, its columns, a caption or a picture is missing or damaged.
    """
    table = open_source(data, cache_dir)
    captions = read_captions(data, table)
    images = select_pictures(data, table)

    def load(row: int) -> Picture:
        image = images[row][data.image_column]
        source, content = read_content(image, f"row {row} of {data.source}")
        digest = hashlib.sha256(content).hexdigest()
        files = _cache_decoded(content, source, cache_dir / "pictures" / digest, crops_px)
        return Picture(files.pop(max(crops_px)), captions[row], source, files, digest)

    rows = range(len(table))[:limit]
    with ThreadPoolExecutor() as pool:
        return list(Bar(pool.map(load, rows), "Reading pictures", len(rows), delay=2))


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


def _cache_decoded(
    content: bytes, source: str, place: Path, crops_px: Collection[int]
) -> dict[int, Path]:
    """Return the cached file for each size of crop; decode the picture if one is not whole."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            side = min(image.size)
            reductions = {px: max(side // (SPARE_RESOLUTION * px), 1) for px in crops_px}
            files = {r: place.with_name(f"{place.name}-{r}.npy") for r in reductions.values()}
            if missing := [r for r, file in files.items() if not is_whole(file)]:
                for reduction, pixels in zip(missing, decode(image, missing), strict=True):
                    save_array(files[reduction], pixels)
    except UnidentifiedImageError as error:
        raise UserError(
            f"The picture {source} is damaged or of an unknown format; remove or replace it."
        ) from error
    except DECODING_ERRORS as error:
        raise UserError(f"The picture {source} is damaged ({error}); replace it.") from error
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
