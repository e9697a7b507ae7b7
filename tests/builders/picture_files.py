"""Picture files of uncommon kinds, and what is in them by arithmetic of its own."""

import io
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WHITE_D50 = (0.9642, 1.0, 0.8249)
"""The white that all profiles refer to (ICC.1:2004, section 7.2.16)."""

TO_SRGB = np.array(
    [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
)
"""From XYZ under D50 to linear sRGB, adapted by Bradford (brucelindbloom.com)."""

DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.784))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""The colours of red, green and blue in XYZ under D50."""

INKS = {(0, 0, 0, 0): (100, 0, 0), (1, 0, 0, 0): (60, -20, -30), (0, 1, 0, 0): (50, 50, 0)}
"""Colours in Lab of paper, cyan and magenta; all else is black."""


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def srgb(xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Levels from 0 to 255 in sRGB of colours [..., 3] in XYZ under D50 (IEC 61966-2-1)."""
    linear = (xyz @ TO_SRGB.T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def seen(
    levels: NDArray[np.uint8], colours: Sequence[Sequence[float]], gamma: float
) -> NDArray[np.float64]:
    """Levels in sRGB of a picture [H, W, 3] in a space of three colours and a gamma."""
    return srgb((levels / 255.0) ** gamma @ np.array(colours))


def lab_seen(lightness: float, a: float, b: float) -> NDArray[np.float64]:
    """Levels in sRGB of a colour in Lab."""
    y = (lightness + 16) / 116
    cubes = np.array([y + a / 500, y, y - b / 200])
    ratios = np.where(cubes > 6 / 29, cubes**3, 3 * (6 / 29) ** 2 * (cubes - 4 / 29))
    return srgb(ratios * np.array(WHITE_D50))


def rgb_profile(colours: Sequence[Sequence[float]], gamma: float) -> bytes:
    """An ICC profile of a display."""
    tags = {f"{name}XYZ": _xyz(colour) for name, colour in zip("rgb", colours, strict=True)}
    return _profile("mntr", "RGB ", "XYZ ", tags | {f"{name}TRC": _curve(gamma) for name in "rgb"})


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of grey levels."""
    return _profile("mntr", "GRAY", "XYZ ", {"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """An ICC profile of the inks above, as a table of their corners."""
    corners = [tuple(int(bit) for bit in f"{index:04b}") for index in range(16)]
    table = [INKS.get(corner, (0, 0, 0)) for corner in corners]
    levels = [level for (light, a, b) in table for level in (light * 255 // 100, a + 128, b + 128)]
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * int(i % 4 == 0) for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4 + bytes(levels) + ramp * 3
    return _profile("prtr", "CMYK", "Lab ", {"A2B0": lut})


def _xyz(colour: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in colour))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(256 * gamma), 0)


def _profile(kind: str, space: str, connection: str, tags: Mapping[str, bytes]) -> bytes:
    tags = {"wtpt": _xyz(WHITE_D50), **tags}
    start, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    kinds = b"".join(word.encode() for word in (kind, space, connection))
    header = struct.pack(">I4sI", start + len(body), b"lcms", 0x02400000) + kinds
    header += bytes(12) + b"acsp" + bytes(28) + _xyz(WHITE_D50)[8:] + bytes(48)
    return header + table + body


def tiff(levels: NDArray[np.generic], bits: int, sample_format: int = 1) -> bytes:
    """A grey TIFF of levels [H, W] of whole numbers with any number of bits (TIFF 6.0)."""
    height, width = levels.shape
    if bits == 12:
        pairs = levels.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        content = b"".join(int(pair).to_bytes(3) for pair in packed)
    else:
        content = levels.astype(levels.dtype.newbyteorder("<")).tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    entries |= {279: len(content), 339: sample_format}
    fields = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items())
    )
    header = struct.pack("<2sHI", b"II", 42, 8 + len(content))
    return header + content + struct.pack("<H", len(entries)) + fields + bytes(4)
