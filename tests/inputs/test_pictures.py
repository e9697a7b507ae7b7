"""Pictures of every kind: what training sees of them, or why it cannot."""

import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from adapters.pictures import reading
from finetune.data.pictures import load_pictures
from finetune.recipe.schema import Data
from tests.builders.inputs import Refused, check_refused
from tests.builders.material import read_material, training
from tests.builders.picture_files import (
    ADOBE_RGB,
    DISPLAY_P3,
    cmyk_profile,
    encoded,
    grey_profile,
    lab_seen,
    rgb_profile,
    seen,
    tiff,
)

WIDTH, HEIGHT, CROP_PX = 14, 10, 8
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
COLOURS = np.stack([18 * COLUMNS, 25 * ROWS, 255 - 9 * (COLUMNS + ROWS)], -1).astype(np.uint8)
"""A picture [H, W, 3] whose every pixel differs."""
GREY = (10 * COLUMNS + 11 * ROWS).astype(np.uint8)
GREY_RGB = np.repeat(GREY[..., None], 3, axis=-1)
PHOTO, GREY_PHOTO = Image.fromarray(COLOURS), Image.fromarray(GREY)
HOLE = ((ROWS - 5) ** 2 + (COLUMNS - 7) ** 2 < 9).astype(bool)
"""The pixels that are transparent where a picture has any."""
P3, ADOBE = rgb_profile(DISPLAY_P3, 2.2), rgb_profile(ADOBE_RGB, 2.2)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@dataclass(frozen=True)
class Accepted:
    """A picture file, and the levels [H, W, 3] in sRGB that training must see of it."""

    name: str
    content: Callable[[], bytes]
    levels: NDArray[np.generic] = field(default_factory=lambda: COLOURS)
    tolerance: float = 0
    file: str = "a.png"
    says: str = ""
    """What must be said of it, once; nothing else may be."""


def turned(orientation: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def holed(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where(HOLE[..., None], np.uint8(255), colours)


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.fromarray((~HOLE * np.uint8(255)).astype(np.uint8)))
    return image


def animated(kind: str, **options: object) -> Callable[[], bytes]:
    frames = [PHOTO, ImageOps.invert(PHOTO)]
    return lambda: encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def palette() -> Image.Image:
    image = Image.fromarray((GREY // 8).astype(np.uint8), "P")
    image.putpalette([level for index in range(32) for level in (8 * index, 255 - index, index)])
    return image


INDICES = GREY // 8
PALETTE = np.stack([8 * INDICES, 255 - INDICES, INDICES], -1).astype(np.uint8)


def with_texts(size: int) -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * size, zip=True)
    return encoded(PHOTO, pnginfo=texts)


def broken_exif(kind: str, **options: object) -> Callable[[], bytes]:
    return lambda: encoded(
        PHOTO, kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 9, **options
    )


LOSSLESS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "png": ("PNG", {}),
    "PNG": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "tif": ("TIFF", {"compression": "tiff_lzw"}),
    "bmp": ("BMP", {}),
    "tga": ("TGA", {}),
    "ppm": ("PPM", {}),
    "pcx": ("PCX", {}),
    "sgi": ("SGI", {}),
    "qoi": ("QOI", {}),
    "jp2": ("JPEG2000", {}),
    "dds": ("DDS", {}),
    "jpg": ("PNG", {}),
}
"""Formats by the endings of names, which need not fit."""

ACCEPTED = [
    *(
        Accepted(
            f"{kind} named .{suffix}",
            lambda k=kind, o=options: encoded(PHOTO, k, **o),
            file=f"a.{suffix}",
        )
        for suffix, (kind, options) in LOSSLESS.items()
    ),
    Accepted("JPEG", lambda: encoded(PHOTO, "JPEG", quality=100, subsampling=0), tolerance=4),
    Accepted(
        "MPO",
        lambda: encoded(
            PHOTO,
            "MPO",
            save_all=True,
            append_images=[GREY_PHOTO.convert("RGB")],
            quality=100,
            subsampling=0,
        ),
        tolerance=4,
        file="a.mpo",
    ),
    Accepted(
        "AVIF",
        lambda: encoded(PHOTO, "AVIF", quality=100, subsampling="4:4:4"),
        tolerance=6,
        file="a.avif",
    ),
    Accepted(
        "AVIF, turned",
        lambda: encoded(PHOTO, "AVIF", quality=100, subsampling="4:4:4", exif=turned(6)),
        np.rot90(COLOURS, -1),
        tolerance=6,
        file="a.avif",
    ),
    Accepted(
        "one bit",
        lambda: encoded(GREY_PHOTO.point(lambda v: 255 * (v > 99), "1")),
        255 * (GREY_RGB > 99),
    ),
    Accepted("grey levels", lambda: encoded(GREY_PHOTO), GREY_RGB),
    Accepted("a palette", lambda: encoded(palette()), PALETTE),
    Accepted("a GIF", lambda: encoded(palette(), "GIF"), PALETTE, file="a.gif"),
    Accepted("a palette in a BMP", lambda: encoded(palette(), "BMP"), PALETTE, file="a.bmp"),
    Accepted(
        "16-bit PNG", lambda: encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY_RGB
    ),
    Accepted(
        "16-bit TIFF",
        lambda: encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
        GREY_RGB,
        file="a.tif",
    ),
    Accepted(
        "16-bit PGM",
        lambda: encoded(Image.fromarray(GREY.astype(np.int32) * 257), "PPM"),
        GREY_RGB,
        file="a.pgm",
    ),
    Accepted(
        "12-bit PGM",
        lambda: (
            f"P5 {WIDTH} {HEIGHT} 4095\n".encode()
            + np.round(GREY * (4095 / 255)).astype(">u2").tobytes()
        ),
        GREY_RGB,
        tolerance=1,
        file="a.pgm",
    ),
    Accepted(
        "12-bit TIFF",
        lambda: tiff(np.round(GREY * (4095 / 255)).astype(np.uint16), 12),
        GREY_RGB,
        file="a.tif",
    ),
    Accepted(
        "16-bit TIFF by hand",
        lambda: tiff(GREY.astype(np.uint16) * 257, 16),
        GREY_RGB,
        file="a.tif",
    ),
    Accepted(
        "floating-point TIFF",
        lambda: encoded(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"),
        GREY_RGB,
        file="a.tif",
    ),
    Accepted(
        "PFM",
        lambda: encoded(Image.fromarray((GREY / 255).astype(np.float32)), "PPM"),
        GREY_RGB,
        file="a.pfm",
    ),
    Accepted("CMYK TIFF", lambda: encoded(PHOTO.convert("CMYK"), "TIFF"), file="a.tif"),
    Accepted(
        "CMYK JPEG",
        lambda: encoded(PHOTO.convert("CMYK"), "JPEG", quality=100),
        tolerance=12,
        file="a.jpg",
    ),
    Accepted(
        "LAB TIFF",
        lambda: encoded(
            Image.merge("LAB", [Image.new("L", PHOTO.size, level) for level in (153, 148, 98)]),
            "TIFF",
        ),
        np.broadcast_to(lab_seen(60, 20, -30), COLOURS.shape),
        tolerance=2,
        file="a.tif",
    ),
    Accepted(
        "YCbCr TIFF", lambda: encoded(PHOTO.convert("YCbCr"), "TIFF"), tolerance=3, file="a.tif"
    ),
    Accepted("RGBA PNG", lambda: encoded(with_alpha(PHOTO.copy())), holed(COLOURS)),
    Accepted(
        "RGBA WebP",
        lambda: encoded(with_alpha(PHOTO.copy()), "WEBP", lossless=True),
        holed(COLOURS),
        file="a.webp",
    ),
    Accepted(
        "RGBA TIFF", lambda: encoded(with_alpha(PHOTO.copy()), "TIFF"), holed(COLOURS), file="a.tif"
    ),
    Accepted(
        "half transparent",
        lambda: encoded(Image.merge("RGBA", [*PHOTO.split(), Image.new("L", PHOTO.size, 51)])),
        np.round(COLOURS / 5.0 + 204),
        tolerance=1,
    ),
    Accepted("LA PNG", lambda: encoded(with_alpha(GREY_PHOTO.copy())), holed(GREY_RGB)),
    Accepted(
        "a transparent colour",
        lambda: encoded(PHOTO, transparency=tuple(int(v) for v in COLOURS[3, 4])),
        np.where((COLOURS[3, 4] == COLOURS).all(-1, keepdims=True), 255, COLOURS),
    ),
    Accepted(
        "a transparent grey level",
        lambda: encoded(GREY_PHOTO, transparency=int(GREY[3, 4])),
        np.where(GREY[3, 4] == GREY_RGB, 255, GREY_RGB),
    ),
    Accepted(
        "a transparent palette entry",
        lambda: encoded(palette(), transparency=5),
        np.where(INDICES[..., None] == 5, 255, PALETTE),
    ),
    Accepted("turned by 180 degrees", lambda: encoded(PHOTO, exif=turned(3)), COLOURS[::-1, ::-1]),
    Accepted("mirrored", lambda: encoded(PHOTO, exif=turned(2)), COLOURS[:, ::-1]),
    Accepted("upside down", lambda: encoded(PHOTO, exif=turned(4)), COLOURS[::-1]),
    Accepted("transposed", lambda: encoded(PHOTO, exif=turned(5)), COLOURS.swapaxes(0, 1)),
    Accepted("turned right", lambda: encoded(PHOTO, exif=turned(6)), np.rot90(COLOURS, -1)),
    Accepted(
        "transversed", lambda: encoded(PHOTO, exif=turned(7)), np.rot90(COLOURS, 2).swapaxes(0, 1)
    ),
    Accepted("turned left", lambda: encoded(PHOTO, exif=turned(8)), np.rot90(COLOURS)),
    Accepted(
        "turned right in a JPEG",
        lambda: encoded(PHOTO, "JPEG", exif=turned(6), quality=100, subsampling=0),
        np.rot90(COLOURS, -1),
        tolerance=4,
        file="a.jpg",
    ),
    Accepted(
        "turned right in a WebP",
        lambda: encoded(PHOTO, "WEBP", exif=turned(6), lossless=True),
        np.rot90(COLOURS, -1),
        file="a.webp",
    ),
    Accepted(
        "turned right in a TIFF",
        lambda: encoded(PHOTO, "TIFF", tiffinfo={0x0112: 6}),
        np.rot90(COLOURS, -1),
        file="a.tif",
    ),
    Accepted(
        "turned right in 16 bits",
        lambda: encoded(Image.fromarray(GREY.astype(np.uint16) * 257), exif=turned(6)),
        np.rot90(GREY_RGB, -1),
    ),
    Accepted("turned by no known amount", lambda: encoded(PHOTO, exif=turned(9))),
    Accepted("turned by nothing", lambda: encoded(PHOTO, exif=turned(0))),
    Accepted("broken EXIF in a PNG", broken_exif("PNG"), says="EXIF is broken"),
    Accepted("broken EXIF in a WebP", broken_exif("WEBP", lossless=True), says="EXIF is broken"),
    Accepted(
        "no EXIF, called so, in a PNG",
        lambda: encoded(PHOTO, exif=b"nothing"),
        says="EXIF is broken",
    ),
    Accepted(
        "no EXIF, called so, in a WebP",
        lambda: encoded(PHOTO, "WEBP", lossless=True, exif=b"nothing"),
        says="EXIF is broken",
        file="a.webp",
    ),
    Accepted("sRGB by profile", lambda: encoded(PHOTO, icc_profile=SRGB)),
    Accepted(
        "Display P3",
        lambda: encoded(PHOTO, icc_profile=P3),
        seen(COLOURS, DISPLAY_P3, 2.2),
        tolerance=2,
    ),
    Accepted(
        "Adobe RGB",
        lambda: encoded(PHOTO, icc_profile=ADOBE),
        seen(COLOURS, ADOBE_RGB, 2.2),
        tolerance=2,
    ),
    Accepted(
        "Adobe RGB in a JPEG",
        lambda: encoded(PHOTO, "JPEG", icc_profile=ADOBE, quality=100, subsampling=0),
        seen(COLOURS, ADOBE_RGB, 2.2),
        tolerance=9,
        file="a.jpg",
    ),
    Accepted(
        "Adobe RGB in a TIFF",
        lambda: encoded(PHOTO, "TIFF", icc_profile=ADOBE),
        seen(COLOURS, ADOBE_RGB, 2.2),
        tolerance=2,
        file="a.tif",
    ),
    Accepted(
        "Adobe RGB, turned",
        lambda: encoded(PHOTO, icc_profile=ADOBE, exif=turned(6)),
        np.rot90(seen(COLOURS, ADOBE_RGB, 2.2), -1),
        tolerance=2,
    ),
    Accepted(
        "Adobe RGB, transparent",
        lambda: encoded(with_alpha(PHOTO.copy()), icc_profile=ADOBE),
        np.where(HOLE[..., None], 255, seen(COLOURS, ADOBE_RGB, 2.2)),
        tolerance=2,
    ),
    Accepted(
        "Adobe RGB in a palette",
        lambda: encoded(palette(), icc_profile=ADOBE),
        seen(PALETTE, ADOBE_RGB, 2.2),
        tolerance=2,
    ),
    Accepted(
        "Adobe RGB for grey levels",
        lambda: encoded(GREY_PHOTO, icc_profile=ADOBE),
        seen(GREY_RGB, ADOBE_RGB, 2.2),
        tolerance=2,
    ),
    Accepted(
        "a profile of grey levels",
        lambda: encoded(GREY_PHOTO, icc_profile=grey_profile(1.0)),
        seen(GREY_RGB, ADOBE_RGB, 1.0),
        tolerance=2,
    ),
    Accepted(
        "a profile of grey levels, in 16 bits",
        lambda: encoded(
            Image.fromarray(GREY.astype(np.uint16) * 257), icc_profile=grey_profile(1.0)
        ),
        seen(GREY_RGB, ADOBE_RGB, 1.0),
        tolerance=2,
    ),
    Accepted(
        "a profile of inks",
        lambda: encoded(
            Image.new("CMYK", PHOTO.size, (255, 0, 0, 0)), "TIFF", icc_profile=cmyk_profile()
        ),
        np.broadcast_to(lab_seen(60, -20, -30), COLOURS.shape),
        tolerance=4,
        file="a.tif",
    ),
    Accepted(
        "a broken profile",
        lambda: encoded(PHOTO, icc_profile=P3[:150]),
        says="colour profile is broken",
    ),
    Accepted(
        "no profile, called so",
        lambda: encoded(PHOTO, icc_profile=b"nothing"),
        says="colour profile is broken",
    ),
    Accepted(
        "a profile of inks for colours",
        lambda: encoded(PHOTO, icc_profile=cmyk_profile()),
        says="colour profile is broken, or for other pixels",
    ),
    Accepted(
        "an animated GIF",
        lambda: encoded(
            palette(), "GIF", save_all=True, append_images=[ImageOps.mirror(palette())]
        ),
        PALETTE,
        file="a.gif",
        says="Only the first frame is read",
    ),
    Accepted(
        "an animated WebP",
        animated("WEBP", lossless=True),
        file="a.webp",
        says="Only the first frame is read",
    ),
    Accepted("an animated PNG", animated("PNG"), says="Only the first frame is read"),
    Accepted("several pages", animated("TIFF"), file="a.tif", says="Only the first frame is read"),
    Accepted("as small as can be", lambda: encoded(PHOTO.crop((0, 0, 8, 8))), COLOURS[:8, :8]),
    Accepted(
        "longer than wide",
        lambda: encoded(PHOTO.resize((WIDTH, 40), Image.Resampling.NEAREST)),
        np.repeat(COLOURS, 4, axis=0),
        says="More than 2 times as long as wide",
    ),
    Accepted("a text of 2 MB", lambda: with_texts(2_000_000)),
]


@pytest.mark.parametrize("case", ACCEPTED, ids=[case.name for case in ACCEPTED])
def test_training_sees_what_the_picture_shows(
    case: Accepted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / case.file).write_bytes(case.content())
    data = Data(source=str(folder), prompt="x")
    (picture,) = load_pictures(data, tmp_path / "cache", CROP_PX)
    assert picture.pixels.shape == case.levels.shape
    assert np.abs(picture.pixels - case.levels.astype(np.float64)).max() <= case.tolerance + 0.5
    said = capsys.readouterr().err
    assert re.sub(r"\S*/", "", said) == "" if not case.says else case.says in said
    assert said.count("\n") == bool(case.says)


def test_pillows_limit_of_pixels_is_neither_heeded_nor_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    PHOTO.save(tmp_path / "pictures" / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    (picture,) = load_pictures(
        Data(source=str(tmp_path / "pictures"), prompt="x"), tmp_path / "cache", CROP_PX
    )
    np.testing.assert_array_equal(picture.pixels, COLOURS)
    assert Image.MAX_IMAGE_PIXELS == 50


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "a.jpg"])
@pytest.mark.parametrize(("exif", "turns"), [(None, 0), (turned(6), -1)])
def test_heic_is_read(name: str, exif: bytes | None, turns: int, tmp_path: Path) -> None:
    import pillow_heif

    (tmp_path / "pictures").mkdir()
    size = (8 * WIDTH, 8 * HEIGHT)  # HEVC has a least size
    options = {} if exif is None else {"exif": exif}
    large = pillow_heif.from_pillow(PHOTO.resize(size, Image.Resampling.NEAREST))
    large.save(tmp_path / "pictures" / name, quality=-1, chroma=444, format="HEIF", **options)
    data = Data(source=str(tmp_path / "pictures"), prompt="x")
    (picture,) = load_pictures(data, tmp_path / "cache", 8 * CROP_PX)
    expected = np.rot90(COLOURS.repeat(8, 0).repeat(8, 1), turns).astype(int)
    assert np.abs(picture.pixels - expected).max() <= 6


def one_file(name: str, content: Callable[[], bytes]) -> Callable[[Path], list[str]]:
    def arrange(folder: Path) -> list[str]:
        (folder / "pictures").mkdir()
        (folder / "pictures" / name).write_bytes(content())
        return training(folder, "data.prompt=a dog")

    return arrange


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def header_of(width: int, height: int) -> bytes:
    """The beginning of a PNG of any size, of one bit."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + check + b"\0\0\0\0IDAT"


def pipe(folder: Path) -> list[str]:
    (folder / "pictures").mkdir()
    os.mkfifo(folder / "pictures" / "a.png")
    return training(folder, "data.prompt=a dog")


def link(target: str) -> Callable[[Path], list[str]]:
    def arrange(folder: Path) -> list[str]:
        (folder / "pictures").mkdir()
        (folder / "pictures" / "a.png").symlink_to(target)
        return training(folder, "data.prompt=a dog")

    return arrange


def flat(width: int, height: int) -> bytes:
    return encoded(Image.new("RGB", (width, height)))


def floats(*levels: float) -> bytes:
    row = np.resize(np.array(levels, dtype=np.float32), (HEIGHT, WIDTH))
    return encoded(Image.fromarray(row), "TIFF")


NO_PICTURES = ("pictures' has no pictures", "put some there")
REFUSED = [
    Refused(
        "one pixel",
        one_file("a.png", lambda: flat(1, 1)),
        ["a.png", "at least 8 px", "found 1 x 1"],
    ),
    Refused(
        "a line",
        one_file("a.png", lambda: flat(1, 2000)),
        ["a.png", "at least 8 px", "found 1 x 2000"],
    ),
    Refused(
        "seven pixels wide", one_file("a.png", lambda: flat(7, 90)), ["a.png", "at least 8 px"]
    ),
    Refused("an empty file", one_file("a.png", bytes), ["a.png", "the file is empty"]),
    Refused(
        "a text", one_file("a.jpg", lambda: b"hello"), ["a.jpg", "damaged or of an unknown format"]
    ),
    Refused(
        "a page",
        one_file("a.jpg", lambda: b"<!DOCTYPE html><html></html>"),
        ["a.jpg", "unknown format", "convert it to PNG"],
    ),
    Refused(
        "a vector graphic",
        one_file("a.png", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ["a.png", "unknown format"],
    ),
    Refused(
        "a film",
        one_file("a.png", lambda: b"\0\0\0\x18ftypmp42" + bytes(40)),
        ["a.png", "unknown format"],
    ),
    Refused(
        "a pickle",
        one_file("a.png", lambda: b"\x80\x04cos\nsystem\n(S'false'\ntR."),
        ["a.png", "unknown format"],
    ),
    Refused(
        "a program in PostScript",
        one_file("a.png", lambda: encoded(PHOTO, "EPS")),
        ["a.png", "unknown format"],
    ),
    Refused(
        "half a PNG",
        one_file("a.png", lambda: half(encoded(PHOTO))),
        ["a.png", "cannot be read", "replace it"],
    ),
    Refused(
        "half a JPEG",
        one_file("a.jpg", lambda: encoded(PHOTO, "JPEG")[:-200]),
        ["a.jpg", "cannot be read"],
    ),
    Refused(
        "half a WebP",
        one_file("a.webp", lambda: encoded(PHOTO, "WEBP")[:-60]),
        ["a.webp", "cannot be read"],
    ),
    Refused(
        "half an AVIF",
        one_file("a.avif", lambda: encoded(PHOTO, "AVIF")[:-60]),
        ["a.avif", "cannot be read"],
    ),
    Refused(
        "half a GIF",
        one_file("a.gif", lambda: encoded(palette(), "GIF")[:-60]),
        ["a.gif", "cannot be read"],
    ),
    Refused(
        "a flipped bit",
        one_file("a.png", lambda: encoded(PHOTO).replace(b"IDAT", b"IDAU")),
        ["a.png", "cannot be read"],
    ),
    Refused(
        "half a HEIC",
        one_file("a.heic", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(9)),
        ["a.heic", "convert it to"],
    ),
    Refused(
        "more pixels than memory",
        one_file("a.png", lambda: header_of(40_000, 40_000)),
        ["a.png", "at most 268,435,456 pixels", "found 40000 x 40000", "smaller"],
    ),
    Refused(
        "floats above 1",
        one_file("a.tif", lambda: floats(0, 200)),
        ["a.tif", "between 0 and 1", "found 0 to 200", "8 bits"],
    ),
    Refused(
        "floats below 0",
        one_file("a.tif", lambda: floats(-0.5, 1)),
        ["a.tif", "between 0 and 1", "found -0.5 to 1"],
    ),
    Refused(
        "no number",
        one_file("a.tif", lambda: floats(0, np.nan)),
        ["a.tif", "between 0 and 1", "nan"],
    ),
    Refused(
        "infinite",
        one_file("a.tif", lambda: floats(0, np.inf)),
        ["a.tif", "between 0 and 1", "inf"],
    ),
    Refused(
        "32-bit whole numbers",
        one_file("a.tif", lambda: tiff(GREY.astype(np.uint32), 32)),
        ["a.tif", "at most 16 bits", "found 32", "8 bits"],
    ),
    Refused(
        "signed whole numbers",
        one_file("a.tif", lambda: tiff(GREY.astype(np.int16) - 99, 16, 2)),
        ["a.tif", "between 0 and 65535", "found -99"],
    ),
    Refused(
        "a pipe", pipe, ["a.png", "there must be a file (found a pipe)", "replace or remove it"]
    ),
    Refused("a link to nothing", link("gone.png"), ["a.png", "found a soft link to nothing"]),
    Refused("a device", link("/dev/zero"), ["a.png", "found a device"]),
    Refused(
        "vector graphics alone", one_file("a.svg", lambda: b"<svg/>"), [*NO_PICTURES, "found a.svg"]
    ),
    Refused("films alone", one_file("a.mov", lambda: b"film"), [*NO_PICTURES, "found a.mov"]),
    Refused("hidden files alone", one_file(".a.png", lambda: encoded(PHOTO)), NO_PICTURES),
]


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
def test_a_picture_that_cannot_be_read_is_named(
    case: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    check_refused(case, read_material, folder, capsys)


def test_heic_without_its_reader_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    reading._register_heif.cache_clear()  # nor registered by another test
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(9)
    case = Refused(
        "HEIC", one_file("a.heic", lambda: content), ["a.heic", "pip install pillow-heif"]
    )
    check_refused(case, read_material, tmp_path, capsys)
