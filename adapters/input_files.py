"""Files that users name: found, read whole, or refused in a sentence before anything hangs."""

import codecs
import lzma
import stat
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from adapters.errors import UserError

Entry: TypeAlias = Path | zipfile.Path
"""A file or folder, on disk or in a zip."""

FILE = "a file"

KINDS: Mapping[str, Callable[[int], bool]] = MappingProxyType(
    {
        FILE: stat.S_ISREG,
        "a folder": stat.S_ISDIR,
        "a pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
)
"""Kinds of things that a path may lead to, by its mode; reading some would wait for ever."""

ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
"""The errors of a zip that is damaged, encrypted or packed by an unknown method."""

LARGEST_BYTES = 2**31
"""The most bytes of a file that is read whole."""


def expand_home(path: str | Path) -> Path:
    """Put the home folder in for a leading ``~``; that of someone who is no user stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def find_kind(path: Path) -> str:
    """Say in words what is at a path."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a soft link to nothing" if path.is_symlink() else "nothing"
    except (OSError, ValueError) as error:  # NUL in a name is a ValueError
        return f"what cannot be read: {getattr(error, 'strerror', None) or error}"
    return next((kind for kind, matches in KINDS.items() if matches(mode)), "something else")


def find_obstacle(path: Path) -> str | None:
    """Say what is at a path in place of a file; ``None``: there is a file."""
    kind = find_kind(path)
    return None if kind == FILE else f"there must be a file (found {kind})"


def read_bytes(entry: Entry, advice: str = "put it there, or name another") -> bytes:
    """Read a file, on disk or in a zip.

    Raises:
        UserError: if it is no file, or cannot be read, with advice.
    """
    if isinstance(entry, Path) and (obstacle := find_obstacle(entry)):
        raise UserError(f"{entry} cannot be read: {obstacle}; {advice}.")
    try:
        size = _find_size(entry)
        if size > LARGEST_BYTES:
            raise UserError(
                f"{entry} has {size:,} bytes, more than {LARGEST_BYTES:,}; name a smaller file."
            )
        return entry.read_bytes()
    except OSError as error:
        raise UserError(f"{entry} cannot be read ({error.strerror or error}); {advice}.") from error
    except ZIP_ERRORS as error:
        raise UserError(f"{entry} cannot be unpacked ({error}); pack the zip again.") from error


def _find_size(entry: Entry) -> int:
    if isinstance(entry, Path):
        return entry.stat().st_size
    return entry.root.getinfo(entry.at).file_size  # unpacked, as the zip promises


def read_text(entry: Entry) -> str:
    """Read a file in UTF-8, dropping any byte-order mark.

    Raises:
        UserError: if it cannot be read, or is in another encoding.
    """
    content = read_bytes(entry)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        found = "UTF-16"
    else:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            found = f"byte 0x{content[error.start]:02x} in line {line}, as Windows-1252 has"
    raise UserError(f"{entry} must be text in UTF-8 (found {found}); save it as UTF-8.")
