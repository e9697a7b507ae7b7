"""Writing without ever leaving half a file."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image, PngImagePlugin
from safetensors import SafetensorError

from adapters.errors import UserError


class RefusedError(UserError):
    """The disk refuses to write to a path."""

    def __init__(self, path: Path, reason: str) -> None:
        self.strerror = " ".join(reason.split())
        """What the system says, as an OSError has it."""
        super().__init__(f"{path} cannot be written ({self.strerror}); mend that, or name another.")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """A block that writes to ``path``; what the disk refuses becomes one sentence.

    Raises:
        UserError: where the disk refuses.
    """
    try:
        yield
    except (
        OSError,
        SafetensorError,
        RefusedError,
    ) as error:  # of a file in a new folder, that folder
        raise RefusedError(path, getattr(error, "strerror", None) or str(error)) from error


def check_out(path: Path, kind: Literal["file", "folder"]) -> None:
    """Check, before the work, that a file or a folder can be written; nothing is left behind.

    Args:
        path: where to; there may be something already.
        kind: what will be written there.

    Raises:
        UserError: where the disk refuses, or there is something of the other kind.
    """
    with written(path):
        if path.exists() and path.is_dir() != (kind == "folder"):
            found = "folder" if path.is_dir() else "file"
            raise UserError(f"{path} must be a {kind}, but is a {found}; name another.")
        places = [path, *path.parents] if kind == "folder" else path.parents
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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, which becomes it once the block has succeeded.

    Raises:
        UserError: where there is something at ``path`` already, or the disk refuses.
    """
    with written(path):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path} is there already and stays as it is; name a new folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            yield new
            new.rename(path)
