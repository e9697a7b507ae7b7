"""Synthetic photographs: JPEGs as large and as slow to decode as a camera's, the same on every run.

python -m benchmarks.photos FOLDER --count 4 --width 4000 --height 3000
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

OCTAVES = 8
"""The number of texture scales, each twice as fine as the one before."""

GRAIN = 6.0
"""The standard deviation of the finest noise, in levels of 0..255, which keeps the JPEG large."""

JPEG_QUALITY = 92


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Draw a colour gradient under texture at every scale, and grain."""
    random = np.random.default_rng(seed)
    corners = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    pixels = _enlarge(corners, width, height)
    for octave in range(1, OCTAVES + 1):
        cells = random.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8)
        pixels += (_enlarge(cells, width, height) - 127.5) / octave
    pixels += GRAIN * random.standard_normal((height, width, 1), dtype=np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _enlarge(cells: np.ndarray, width: int, height: int) -> np.ndarray:
    picture = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.float32)


def save_photos(folder: Path, count: int, width: int, height: int) -> None:
    """Write ``000.jpg`` and so on; existing files are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        file = folder / f"{index:03}.jpg"
        if not file.exists():
            photo(width, height, seed=index).save(file, quality=JPEG_QUALITY)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--height", type=int, default=3000)
    options = parser.parse_args()
    save_photos(options.folder, options.count, options.width, options.height)


if __name__ == "__main__":
    main()
