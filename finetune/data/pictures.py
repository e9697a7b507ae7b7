"""Pictures: decoded once, cropped as IF's training pictures were.

A picture is decoded into 8-bit RGB arrays, which lie in the cache under the hash of its file, a
large one in a reduction for each size of crop. They are mapped into memory, and a step reads no
more of them than its crop.
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
from tqdm.auto import tqdm

from adapters.atomic import replacing
from adapters.errors import UserError
from adapters.pictures.reading import DECODING_ERRORS, to_rgb
from finetune.data.sources import open_source, read_captions, read_content, select_pictures
from finetune.recipe.schema import Data

SPARE_RESOLUTION = 4
"""A picture is cached with a short side of at least this many times the crop's."""


@dataclass(frozen=True)
class Picture:
    """One captioned picture, whose pixels lie in the cache."""

    file: Path
    """The decoded picture in the cache for the largest crops, a ``.npy`` file."""
    caption: str
    source: str
    """Its origin: its path, or the dataset and row."""
    reduced: Mapping[int, Path] = field(default_factory=dict)
    """The same for smaller crops, by their side in pixels."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """[H, W, 3] RGB for the largest crops, mapped from the cache and read-only."""
        return _map(self.file)

    def pixels_for(self, size_px: int) -> NDArray[np.uint8]:
        """The pixels that crops of a size are taken from, the same whatever other sizes are."""
        return _map(self.reduced.get(size_px, self.file))


def _map(file: Path) -> NDArray[np.uint8]:
    # again each time: a map keeps its file open, and the number of open files is limited
    return np.load(file, mmap_mode="r", allow_pickle=False)


def load_pictures(
    data: Data, cache_dir: Path, *crops_px: int, limit: int | None = None
) -> list[Picture]:
    """Load the pictures of a recipe, each decoded once and kept in the cache for later runs.

    Args:
        data: a folder of pictures captioned by one prompt for all, by ``metadata.jsonl`` or by a
            ``.txt`` beside each; a folder written by ``save_to_disk``; or whatever
            ``datasets.load_dataset`` takes.
        cache_dir: the recipe's cache.
        crops_px: the sides of the crops that will be taken; far larger pictures are cached in a
            reduction for each.
        limit: the number of pictures to read at most, from the first on; ``None``: all.

    Raises:
        UserError: if the source, its columns, a caption or a picture is missing or damaged.
    """
    table = open_source(data, cache_dir)
    captions = read_captions(data, table)
    images = select_pictures(data, table)

    def load(row: int) -> Picture:
        image = images[row][data.image_column]
        source, content = read_content(image, f"row {row} of {data.source}")
        files = _cache_decoded(content, source, cache_dir / "pictures", crops_px)
        return Picture(files.pop(max(crops_px)), captions[row], source, files)

    rows = range(len(table))[:limit]
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(load, rows), "Reading pictures", len(rows), delay=2))


def crop(
    picture: Picture,
    size_px: int,
    rng: np.random.Generator,
    *,
    center_shift: float,
    horizontal_flip: bool,
) -> Image.Image:
    """Crop a square of [size_px, size_px], augmented as IF's pictures were (its model cards).

    The crop is the largest square that fits. Its centre moves from the picture's along the longer
    side, uniformly by up to ``center_shift`` of the crop's side and never out of the picture, so a
    square picture is taken whole. It is resized with Pillow's BICUBIC and ``reducing_gap=None``.

    Args:
        picture: the picture to crop.
        size_px: the side of the result.
        rng: draws the shift and the flip; two numbers, whatever the picture.
        center_shift: a fraction of the crop's side; 0: the centre.
        horizontal_flip: mirror every other picture.
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
    """An RGB picture as [3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _cache_decoded(
    content: bytes, source: str, folder: Path, crops_px: Collection[int]
) -> dict[int, Path]:
    """The decoded picture in the cache for each size of crop; decode it if one is missing."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            digest, side = hashlib.sha256(content).hexdigest(), min(image.size)
            reductions = {px: max(side // (SPARE_RESOLUTION * px), 1) for px in crops_px}
            files = {r: folder / f"{digest}-{r}.npy" for r in reductions.values()}
            if missing := [r for r, file in files.items() if not file.exists()]:
                for reduction, pixels in zip(missing, decode(image, missing), strict=True):
                    with replacing(files[reduction]) as temporary:
                        np.save(temporary, pixels, allow_pickle=False)
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
        reductions: widths and heights of the boxes in pixels; those that the right and lower edge
            would cut are left out.

    Returns:
        [H, W, 3] RGB for each reduction.
    """
    image = to_rgb(image)

    def reduce(reduction: int) -> NDArray[np.uint8]:
        width, height = (side - side % reduction for side in image.size)
        return np.asarray(image.reduce(reduction, (0, 0, width, height)))

    return [reduce(reduction) for reduction in reductions]
