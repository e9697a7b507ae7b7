"""Small text files of users and models: read whole, in UTF-8, up to a size."""

import codecs
import json
import stat
from pathlib import Path
from typing import Any

MIB = 2**20

MOST_BYTES = 64 * MIB
"""The size above which a file is not read: tokenizers' take a few MiB."""


def read_text(path: str | Path, most_bytes: int = MOST_BYTES) -> str:
    """Read a text file in UTF-8, dropping any byte-order mark.

    Raises:
        ValueError: with the reason, such as ``there is no such file``: it is missing, refused, no
            regular file, too large, or in another encoding.
    """
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe without a writer would be waited for
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
            raise ValueError(f"it is {kind}, not a file")
        if found.st_size > most_bytes:
            raise ValueError(
                f"it has {found.st_size / MIB:.1f} MiB, more than {most_bytes / MIB:g}"
            )
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except OSError as error:
        raise ValueError(str(error.strerror or error)) from error
    return _decode(content)


def _decode(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is in UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"byte 0x{content[error.start]:02x} in line {line} is not UTF-8; save it as UTF-8"
        ) from None


def parse_object(text: str) -> dict[str, Any]:
    """Read a text that is a JSON object.

    Raises:
        ValueError: with the reason, such as ``got a list``: it is other JSON, or none.
    """
    try:
        tree = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError(f"got a {type(tree).__name__}")
    return tree


def _refuse_constant(name: str) -> None:
    """Refuse ``NaN`` and ``Infinity``, which Python takes although JSON has none."""
    raise ValueError(f"JSON has no {name}")
