"""Reading of pictures of any format as RGB and as tensors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from adapters.errors import UserError

DECODING_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""The errors that Pillow raises if a file is not a picture, or is damaged."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB, upright by its EXIF tag, with transparent areas white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey levels
        levels = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(levels.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture file; a UserError if it cannot be read, there or in the block."""
    try:
        with Image.open(path) as image:
            yield image
    except DECODING_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"The picture {path} cannot be read ({reason}); name another.") from error


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture file as RGB; a UserError if it cannot be read."""
    with open_picture(path) as image:
        return to_rgb(image)


def to_mask(image: Image.Image) -> Image.Image:
    """Convert a mask to 8-bit RGB, upright by its EXIF tag, with transparent areas black.

    What is painted white on transparency is then drawn again, and the rest stays.
    """
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image)
    return to_rgb(image)


def read_mask(path: str | Path) -> Image.Image:
    """Read a mask file as :func:`to_mask` does; a UserError if it cannot be read."""
    with open_picture(path) as image:
        return to_mask(image)


def as_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Convert N RGB pictures of one size to pixels [N, 3, height, width] in [-1, 1]."""
    levels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return levels.permute(0, 3, 1, 2) / 127.5 - 1
