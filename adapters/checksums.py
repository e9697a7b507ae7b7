"""Checksums of a folder's files, as ``sha256sum`` writes and checks them.

The file of checksums is written last, so it also says that the folder is complete.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from adapters.atomic import write_text

DIGITS = 2 * hashlib.sha256().digest_size
"""The length of a checksum in hexadecimal digits."""

SUMS = "SHA256SUMS"
"""The file in a folder with the checksums of others; ``sha256sum -c SHA256SUMS`` checks them."""

WHOLE_BYTES = 2**28
"""The size up to which a model's file is hashed whole; a larger one is hashed in blocks."""

BLOCK_BYTES = 2**20
"""The size of a hashed block of a large file."""

BLOCKS = 100
"""The number of hashed blocks of a large file, evenly spaced from its first byte to its last."""


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of files, named by their paths in the folder.

    Raises:
        UserError: if the folder cannot be written to.
    """
    lines = (f"{digest_file(folder / name)}  {name}\n" for name in sorted(names))
    write_text(folder / SUMS, "".join(lines))


def read_sums(folder: Path) -> dict[str, str]:
    """Read the checksums of a folder's files, by name; empty: there are none, or not whole."""
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    rows = [line.split("  ", 1) for line in text.splitlines()]
    whole = text.endswith("\n") and all(
        len(row) == 2 and len(row[0]) == DIGITS and _is_inside(row[1]) for row in rows
    )
    return {name: digest for digest, name in rows} if whole else {}


def _is_inside(name: str) -> bool:
    """Tell whether a name is that of a file in the folder itself."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def find_damage(folder: Path, names: Iterable[str]) -> str | None:
    """Say which of some files is not as its checksum says, and why; ``None``: all are.

    Raises:
        PermissionError: if a file is there but must not be read.
    """
    sums = read_sums(folder)
    for name in names:
        if name not in sums:
            return f"{SUMS} does not list {name}" if sums else f"{SUMS} is missing or damaged"
        try:
            found = digest_file(folder / name)
        except PermissionError:
            raise
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if found != sums[name]:
            return f"{name} has other bytes than were written"
    return None


def digest_file(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_blocks(files: Mapping[str, Path]) -> str:
    """Compute one SHA-256, in hexadecimal digits, of files' names, sizes and content.

    Of large files, only blocks are read. That tells models apart, but does not find damage.
    """
    digest = hashlib.sha256()
    for name, file in files.items():
        size = file.stat().st_size
        digest.update(f"\n{name} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= WHOLE_BYTES:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            for block in range(BLOCKS):
                stream.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
