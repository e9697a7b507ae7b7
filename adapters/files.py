"""Writing without ever leaving half a file."""

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, PngImagePlugin
from safetensors import SafetensorError

from adapters.errors import UserError


def check_place(path: Path, *, folder: bool) -> None:
    """Check, before the work, that its result can be written.

    Args:
        path: where to.
        folder: whether it will be a folder; otherwise a file.

    Raises:
        UserError: where the other is there, or what it would lie in is no folder to write to.
    """
    if path.exists() and path.is_dir() != folder:
        found, wanted = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise UserError(f"{path} is {found} where {wanted} is to be written; name another place.")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    around = there if there.is_dir() else there.parent
    if (there != path and there != around) or not os.access(around, os.W_OK | os.X_OK):
        raise UserError(f"Nothing can be written to {path}; name a place in a folder of yours.")


class NotWrittenError(UserError):
    """The disk refuses."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which replaces it once the block has succeeded.

    Raises:
        UserError: where the disk refuses.
    """
    try:
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
    except (OSError, SafetensorError) as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: BaseException) -> NotWrittenError:
    reason = " ".join(str(error).split())
    return NotWrittenError(f"{path} cannot be written ({reason}); mend that, or name another.")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_png(path: Path, picture: Image.Image, text: PngImagePlugin.PngInfo | None = None) -> None:
    """Write a PNG whole, with texts that it carries."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=text)


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
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already and stays as it is; name a new folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            yield new
            new.rename(path)
    except (OSError, SafetensorError, NotWrittenError) as error:
        raise _refused(path, error.__cause__ or error) from error
