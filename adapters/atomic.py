"""Writers of files and folders, each written whole or not at all.

What is written reaches the disk before it gets its final name, so that not even a machine that
loses its power leaves half of it under that name. Until then it is in a temporary file or folder
next to its place, which its writer keeps locked: those without a lock are left from writers that
were killed, and are cleared away.
"""

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image, PngImagePlugin
from safetensors import SafetensorError

from adapters.errors import UserError

if sys.platform != "win32":
    import fcntl

TEMPORARY = ".partial-"
"""The beginning of the names of all temporary files and folders."""


class NotWrittenError(UserError):
    """A path that the disk refuses to write to."""

    def __init__(self, path: Path, reason: str) -> None:
        self.strerror = " ".join(reason.split())
        """The system's reason, named as in an OSError."""
        super().__init__(f"{path} cannot be written ({self.strerror}); fix that, or name another.")


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Run a block that writes to ``path`` or into it; a UserError names it if the disk refuses."""
    if "\0" in str(path):
        raise UserError(f"{path} has a NUL character, which no name can have; name another.")
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
        with temporary_folder(there):
            pass


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` that replaces it once the block has succeeded.

    Args:
        path: the file to write.
        durable: wait until the file is on the disk. Thousands of files that are checked when they
            are read, and can be made again, need not wait.

    Raises:
        UserError: if the disk refuses.
    """

    def create() -> Path:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=path.suffix)
        os.close(handle)
        return Path(name)

    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(create) as temporary:
            try:
                yield temporary
                temporary.chmod(0o644)
                if durable:
                    flush(temporary)
                os.replace(temporary, path)
                if durable:
                    flush(path.parent)
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder in ``parent``, which must exist, that is deleted after the block."""
    with _locked(lambda: Path(tempfile.mkdtemp(dir=parent, prefix=TEMPORARY))) as temporary:
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """Delete the temporary files and folders, anywhere in ``root``, of writers that were killed.

    Those of live writers stay, and so does everything on a disk that knows no locks.
    """
    for place, folders, files in os.walk(root):
        for name in [each for each in (*folders, *files) if each.startswith(TEMPORARY)]:
            path = Path(place, name)
            try:
                handle = os.open(path, os.O_RDONLY)
            except OSError:  # its writer has finished, or it is another user's
                continue
            try:
                if not _lock(handle, wait=False):
                    continue
                if name in folders:
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            except OSError:  # a disk that cannot be written to; nothing depends on it
                continue
            finally:
                os.close(handle)
        folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]


@contextmanager
def _locked(create: Callable[[], Path]) -> Iterator[Path]:
    """Create a temporary file or folder, and keep it locked during the block."""
    while True:
        path = create()
        if sys.platform == "win32":  # where an open file cannot get its final name
            yield path
            return
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # cleared away before it was locked
            continue
        try:
            _lock(handle, wait=True)
            if path.exists():
                yield path
                return
        finally:
            os.close(handle)


def _lock(handle: int, *, wait: bool) -> bool:
    """Lock an open file or folder; ``False``: another process has, or the disk knows no locks."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if sys.platform == "win32":  # which opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks cannot wait
            raise
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Wait until a folder with all that is in it is on the disk."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            flush(Path(place, name))
        flush(Path(place))


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
    flush_tree(new)
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
    flush(folder.parent)


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
        with temporary_folder(path.parent) as temporary:
            new = temporary / "new"
            new.mkdir()
            yield new
            flush_tree(new)
            new.rename(path)
            flush(path.parent)
