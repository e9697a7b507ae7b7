"""Writing without ever leaving half a file."""

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image, PngImagePlugin
from safetensors import SafetensorError

from adapters.errors import UserError


class NotWrittenError(UserError):
    """The disk refuses to write to a path."""

    def __init__(self, path: Path, reason: str) -> None:
        self.strerror = " ".join(reason.split())
        """What the system says, as an OSError has it."""
        super().__init__(f"{path} cannot be written ({self.strerror}); mend that, or name another.")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """A block that writes to ``path``, or to files in it.

    Raises:
        UserError: where the disk refuses, naming ``path``.
    """
    try:
        yield
    except (OSError, SafetensorError, NotWrittenError) as error:
        raise NotWrittenError(path, getattr(error, "strerror", None) or str(error)) from error


def check_out(path: Path, kind: Literal["file", "folder", "new folder"]) -> None:
    """Check, before the work, that its result can be written; nothing is left behind.

    Args:
        path: where to.
        kind: what will be written there. A file or a folder may be there already, a new folder only
            if it is empty.

    Raises:
        UserError: where the disk refuses, or something else is there.
    """
    with written(path):
        if path.exists():
            found = "folder" if path.is_dir() else "file"
            if kind == "new folder" and (found == "file" or any(path.iterdir())):
                raise UserError(f"{path} is there already and stays as it is; name a new folder.")
            if not kind.endswith(found):
                raise UserError(f"{path} must be a {kind}, but is a {found}; name another.")
        places = [path] * (kind == "folder") + [*path.absolute().parents]
        there = next(place for place in places if place.exists())
        with tempfile.TemporaryDirectory(dir=there, prefix=".check-"):
            pass


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which replaces it once the block has succeeded.

    Raises:
        UserError: where the disk refuses.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_png(path: Path, picture: Image.Image, text: PngImagePlugin.PngInfo | None = None) -> None:
    """Write a PNG whole, with texts that it carries; ``None``: those of the picture, if any."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", **({} if text is None else {"pnginfo": text}))


def replace_folder(new: Path, folder: Path) -> None:
    """Put the folder ``new`` at ``folder``; what was there is beside it, and is back if that fails.

    On Linux the two change places at once, so that whoever looks, at any time, finds one of them.
    """
    if not folder.exists():
        os.replace(new, folder)
    elif not _exchanged(new, folder):
        old = new.with_name("old")
        os.replace(folder, old)
        try:
            os.replace(new, folder)
        except BaseException:
            os.replace(old, folder)
            raise


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two paths have changed places; ``False``: the system or the disk does not do that."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, which becomes it once the block has succeeded.

    Raises:
        UserError: where there is something at ``path`` already, or the disk refuses.
    """
    check_out(path, "new folder")
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            yield new
            new.rename(path)
