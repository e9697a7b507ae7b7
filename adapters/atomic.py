"""Writers of files and folders, each written whole or not at all."""

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
    """A path that the disk refuses to write to."""

    def __init__(self, path: Path, reason: str) -> None:
        self.strerror = " ".join(reason.split())
        """The system's reason, named as in an OSError."""
        super().__init__(f"{path} cannot be written ({self.strerror}); fix that, or name another.")


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Run a block that writes to ``path`` or into it; a UserError names it if the disk refuses."""
    try:
        yield
    except (OSError, SafetensorError, NotWrittenError) as error:
        reason = None if isinstance(error, SafetensorError) else error.strerror
        raise NotWrittenError(path, reason or str(error)) from error


def check_out(path: Path, kind: Literal["file", "folder", "new folder"]) -> None:
    """Check before the work that its result can be written, leaving nothing behind.

    A file or a folder may exist already, a new folder only if it is empty.

    Raises:
        UserError: if the disk refuses, or something else is at ``path``.
    """
    with writing_to(path):
        if path.exists():
            found = "folder" if path.is_dir() else "file"
            if kind == "new folder" and (found == "file" or any(path.iterdir())):
                raise UserError(f"{path} already exists; name a new folder.")
            if not kind.endswith(found):
                raise UserError(f"{path} must be a {kind}, but is a {found}; name another.")
        places = [path] * (kind == "folder") + [*path.absolute().parents]
        there = next(place for place in places if place.exists())
        # only a trial write shows every obstacle: permissions, quotas, read-only mounts
        with tempfile.TemporaryDirectory(dir=there, prefix=".check-"):
            pass


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` that replaces it once the block has succeeded.

    Raises:
        UserError: if the disk refuses.
    """
    with writing_to(path):
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
    """Write a PNG whole, with texts in it; ``None``: the picture's own, if any."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", **({} if text is None else {"pnginfo": text}))


def replace_folder(new: Path, folder: Path) -> None:
    """Put the folder ``new`` at ``folder``; the old one moves next to ``new``, or back on failure.

    On Linux the two change places in one step, so that a reader always finds one of them.
    """
    if not folder.exists():
        os.replace(new, folder)
    elif not _exchange(new, folder):
        old = new.with_name("old")
        os.replace(folder, old)
        try:
            os.replace(new, folder)
        except BaseException:
            os.replace(old, folder)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; ``False``: the system or the disk cannot do that."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None).renameat2
    except AttributeError:  # the C library is too old
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that moves to ``path`` once the block has succeeded.

    Raises:
        UserError: if something is at ``path`` already, or the disk refuses.
    """
    check_out(path, "new folder")
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            yield new
            new.rename(path)
