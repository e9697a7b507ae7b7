"""Reading of pictures of any format as RGB and as tensors."""

import io
import logging
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import (
    Image,
    ImageCms,
    ImageFile,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)
from torch import Tensor

from adapters.errors import UserError, first_line
from adapters.input_files import expand_home, read_bytes

logger = logging.getLogger(__name__)

FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "MPO", "GIF", "BMP", "DIB", "JPEG2000", "PPM"),
    *("TGA", "PSD", "ICO", "ICNS", "PCX", "SGI", "DDS", "QOI"),
)
"""Pillow's formats that are read. Others are left out: EPS, which is a program and would be run."""

HEIF = "HEIF"
"""The format of phones' photos, which Pillow reads with the help of pillow-heif."""

HEIF_SUFFIXES = (".heic", ".heif", ".hif")

HEVC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
"""The brands, in a file's first box, of pictures that are coded as HEIC
(ISO/IEC 23008-12, annex B.4)."""

LARGEST_PX = 2**28
"""The most pixels of a picture that is read, in RGB 0.8 GB; phones take 200 million."""

DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, OverflowError)
"""The errors that Pillow raises if a file is not a picture, or is damaged."""

EXIF_ERRORS = (*DECODING_ERRORS, TypeError, LookupError, AttributeError, ZeroDivisionError)
"""The errors that Pillow raises if a picture's EXIF is broken."""

ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held."""

UPRIGHT: Mapping[object, Image.Transpose] = MappingProxyType(
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)
"""Turns that put a picture upright, by its EXIF orientation (EXIF 2.32, section 4.6.4)."""

PROFILED_MODES = MappingProxyType({"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK", "Lab ": "LAB"})
"""The mode of the pixels that a colour profile is about, by its colour space."""

MANAGED = (
    ImageCms.Flags.BLACKPOINTCOMPENSATION
    | ImageCms.Flags.NOCACHE  # pictures are read by several threads
)

# ComfyUI writes workflows of megabytes into PNGs; what all texts may take in memory, 64 MiB, stays
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class UnsuitableError(UserError):
    """A picture that is whole but cannot be read right: what was found, and what to do."""


_opening = threading.Lock()
"""Held while settings of the whole process are others: Pillow's limit of pixels, and warnings."""


@cache
def _find_openers() -> tuple[str, ...]:
    """Find the formats that have an opener of their own: MPO is opened as JPEG."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


@cache
def picture_suffixes() -> frozenset[str]:
    """Return the endings of pictures' names, in lower case."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in FORMATS) | {*HEIF_SUFFIXES}


@contextmanager
def open_picture(path: str | Path, content: bytes | None = None) -> Iterator[ImageFile.ImageFile]:
    """Open a picture file; a UserError if it cannot be read, there or in the block.

    Args:
        path: the file, which errors name.
        content: what is in it; ``None``: it is read.
    """
    if content is None:
        content = read_bytes(expand_home(path))
    try:
        with _open(content) as image:
            width, height = image.size
            if width * height > LARGEST_PX:
                raise UnsuitableError(
                    f"A picture must have at most {LARGEST_PX:,} pixels (found {width} x {height});"
                    " make it smaller."
                )
            yield image
    except UnidentifiedImageError as error:
        if not content:
            raise UserError(f"The picture {path} cannot be read: the file is empty.") from error
        raise UserError(
            f"The picture {path} cannot be read (it is damaged or of an unknown format); replace"
            " it, or convert it to PNG."
        ) from error
    except UnsuitableError as error:
        sentence = str(error)
        raise UserError(f"{path}: {sentence[0].lower()}{sentence[1:]}") from error
    except DECODING_ERRORS as error:
        raise UserError(
            f"The picture {path} cannot be read ({first_line(error)}); replace it."
        ) from error


def _open(content: bytes) -> ImageFile.ImageFile:
    formats = _find_openers()
    if _is_heic(content):
        _register_heif()
        formats = (HEIF,)
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(content), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _is_heic(content: bytes) -> bool:
    """Tell whether content is a HEIC picture, by the brands in its first box."""
    if content[4:8] != b"ftyp":
        return False
    box = content[8 : min(int.from_bytes(content[:4]), 1024)]
    return not HEVC_BRANDS.isdisjoint(box[start : start + 4] for start in range(0, len(box), 4))


@cache
def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise UnsuitableError(
            "A HEIC picture needs the package pillow-heif: `pip install pillow-heif`, or convert it"
            " to JPEG."
        ) from error
    register_heif_opener()


def find_oddities(image: ImageFile.ImageFile) -> list[str]:
    """List what is not read of an opened picture, each as the beginning of a sentence."""
    oddities = []
    # the further frames of these formats are previews, layers and maps of one picture
    if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD", HEIF):
        oddities.append("Only the first frame is read of")
    if _find_orientation(image) is None:
        oddities.append("EXIF is broken, and ignored, so that it may lie on its side, in")
    profile = image.info.get("icc_profile")
    if profile and _find_managed_mode(profile, image.mode) is None:
        oddities.append("The colour profile is broken, or for other pixels, and ignored in")
    return oddities


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB.

    It is turned upright by its EXIF orientation and converted to sRGB from the colour space of its
    ICC profile; transparent areas become white.

    Raises:
        UnsuitableError: if the range of its levels is not known.
    """
    profile = image.info.get("icc_profile")
    opaque, alpha = _split_alpha(_to_eight_bits(image))
    rgb = _to_srgb(opaque, profile)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    return _turn_upright(rgb, image)


def to_mask(image: Image.Image) -> Image.Image:
    """Convert a mask to 8-bit RGB, upright by its EXIF orientation, with transparent areas black.

    What is painted white on transparency is then drawn again, and the rest stays.

    Raises:
        UnsuitableError: if the range of its levels is not known.
    """
    opaque, alpha = _split_alpha(_to_eight_bits(image))
    rgb = opaque.convert("RGB")
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "black"), alpha)
    return _turn_upright(rgb, image)


def _turn_upright(converted: Image.Image, image: Image.Image) -> Image.Image:
    """Turn what a picture was converted to, as the picture's EXIF says."""
    turn = UPRIGHT.get(_find_orientation(image))
    return converted if turn is None else converted.transpose(turn)


def _find_orientation(image: Image.Image) -> int | None:
    """Find a picture's EXIF orientation, 1 without any; ``None``: its EXIF is broken."""
    with _opening, warnings.catch_warnings(record=True, action="always") as told:
        try:
            orientation = int(image.getexif().get(ORIENTATION, 1))
        except EXIF_ERRORS:
            return None
    return None if any("EXIF" in str(each.message) for each in told) else orientation


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit, 12-bit and floating-point grey levels to 8 bits; leave others as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    white = 1.0 if image.mode == "F" else _white_level(image)
    levels: NDArray[np.float32] = np.asarray(image, dtype=np.float32)
    if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= white):
        raise UnsuitableError(
            f"A picture's grey levels must be between 0 and {white:g} (found {levels.min():g} to"
            f" {levels.max():g}); save it with 8 bits."
        )
    return Image.fromarray((levels * (255 / white)).round().astype(np.uint8))


def _white_level(image: Image.Image) -> int:
    """Return the level that is white in a picture of whole numbers of more than 8 bits."""
    bits = 16
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0]
    if bits > 16:
        raise UnsuitableError(
            f"A picture's grey levels must have at most 16 bits (found {bits}, whose range is not"
            " known); save it with 8 bits."
        )
    return 2**bits - 1


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split a picture into its opaque pixels and their opacity, if it has one."""
    if not image.has_transparency_data:
        return image, None
    grey = image.mode in ("1", "L", "LA", "La")
    whole = image.convert("LA" if grey else "RGBA")
    return whole.convert("L" if grey else "RGB"), whole.getchannel("A")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an opaque picture to RGB, from the colours that its profile describes, if any."""
    if image.mode == "LAB":
        profile = profile or ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    mode = _find_managed_mode(profile, image.mode) if profile else None
    if profile is None or mode is None:
        return image.convert("RGB")
    image = image.convert(mode)
    if _is_srgb(profile, mode):
        return image
    return _transform(profile, mode).apply(image)


def _find_managed_mode(profile: bytes, mode: str) -> str | None:
    """Return the mode that pixels must have for their profile; ``None``: it can't be used.

    Grey levels may have a profile of RGB, which then is about equal red, green and blue.
    """
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space
        managed = PROFILED_MODES.get(space)
        if managed is None:
            return None
        _transform(profile, managed)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    grey = mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")
    natural = "L" if grey else mode if mode in ("CMYK", "LAB") else "RGB"
    return managed if managed == natural or (managed == "RGB" and grey) else None


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """Build the transform of pixels of a mode from their profile to sRGB."""
    return ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        MANAGED,
    )


@lru_cache(maxsize=16)
def _is_srgb(profile: bytes, mode: str) -> bool:
    """Tell whether a profile describes sRGB itself, which is then left as it is, bit for bit."""
    if mode != "RGB":
        return False
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    managed = np.asarray(_transform(profile, mode).apply(Image.fromarray(grid)))
    return int(np.abs(managed.astype(np.int16) - grid).max()) <= 1


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture file as RGB, with a warning of what of it is not; a UserError if none can."""
    with warnings.catch_warnings(action="ignore"), open_picture(path) as image:
        for oddity in find_oddities(image):
            logger.warning("%s %s.", oddity, path)
        return to_rgb(image)


def read_mask(path: str | Path) -> Image.Image:
    """Read a mask file as :func:`to_mask` does; a UserError if it cannot be read."""
    with open_picture(path) as image:
        return to_mask(image)


def as_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Convert N RGB pictures of one size to pixels [N, 3, height, width] in [-1, 1]."""
    levels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return levels.permute(0, 3, 1, 2) / 127.5 - 1
