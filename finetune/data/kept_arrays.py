"""Arrays kept in the cache: ``.npy`` files that end in a digest of what is before it.

NumPy reads no further than the array, so they can be mapped into memory as any other.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import xxhash  # twenty times as fast as SHA-256, and damage is no adversary
from numpy.typing import NDArray

from adapters.atomic import replacing


def save_array(file: Path, array: NDArray[Any]) -> None:
    """Write an array whole, with its digest.

    Raises:
        UserError: if the file cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    content = buffer.getvalue()
    with replacing(file, durable=False) as temporary:
        temporary.write_bytes(content + xxhash.xxh3_128_digest(content))


def is_whole(file: Path) -> bool:
    """Tell whether a file is there and as it was written."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    end = len(content) - xxhash.xxh3_128().digest_size
    return end > 0 and xxhash.xxh3_128_digest(memoryview(content)[:end]) == content[end:]


def map_array(file: Path) -> NDArray[Any]:
    """Map an array into memory, read-only."""
    return np.load(file, mmap_mode="r", allow_pickle=False)
