"""Sources of pictures and captions: folders, zips and datasets, opened row by row."""

import re
from collections.abc import Sequence
from pathlib import Path

from datasets import ReadInstruction

from adapters.errors import UserError, listed
from adapters.input_files import Entry, expand_home, find_kind
from finetune.data.dataset_tables import has_tables, is_saved, open_table
from finetune.data.notes import Notes
from finetune.data.picture_folders import (
    FolderRows,
    Row,
    find_folders,
    holds_pictures,
    list_folder,
    open_folder,
)
from finetune.data.rows import TRAINING, Rows, Wording
from finetune.recipe.schema import Data

REMOTE = ("hf://", "buckets/")
"""The beginnings of names on the hub that may have more than one slash."""


def load_captions(data: Data, cache_dir: Path, wording: Wording = TRAINING) -> list[str]:
    """Load the captions of :func:`finetune.data.pictures.load_pictures`, but no picture."""
    rows = open_source(data, cache_dir, wording)
    captions = rows.read_captions()
    rows.notes.say()
    return captions


def has_captions(folder: Path) -> bool:
    """Tell whether a folder or zip of pictures has captions of its own."""
    opened = open_folder(folder)
    if opened is None or _holds_dataset(folder, Data(source=str(folder))):
        return False
    return list_folder(
        Data(source=str(folder), prompt="none"), opened, TRAINING, Notes()
    ).has_captions


def open_source(
    data: Data, cache_dir: Path, wording: Wording = TRAINING, notes: Notes | None = None
) -> Rows:
    """Open what a recipe names, without decoding its pictures.

    A folder with a dataset's files, and none of pictures or a list of them in it, is a dataset.
    Any other folder, and a zip, is one of pictures, as are the folders below it.

    Args:
        data: the source, and the names of its columns and split.
        cache_dir: the recipe's cache.
        wording: the setting that names the source, for messages.
        notes: collects what of the source is not read.

    Raises:
        UserError: if there is no such source, it cannot be read, or it is empty.
    """
    if "\0" in data.source:
        raise UserError(f"{wording.setting} {data.source!r} has a NUL character; leave it out.")
    path, notes = expand_home(data.source), Notes() if notes is None else notes
    folder = open_folder(path)
    if folder is None:
        _check_remote(data, path, wording)
        return open_table(data, None, cache_dir, wording, notes)
    if _holds_dataset(path, data):
        return open_table(data, path, cache_dir, wording, notes)
    return _open_pictures(data, folder, wording, notes)


def _holds_dataset(path: Path, data: Data) -> bool:
    """Tell whether a folder is read by ``datasets``, rather than as one of pictures."""
    if not path.is_dir():
        return False
    chosen = data.config is not None
    return is_saved(path) or chosen or (not holds_pictures(path) and has_tables(path))


def _check_remote(data: Data, path: Path, wording: Wording) -> None:
    """Raise a UserError if a source that is no folder cannot be the name of a dataset either."""
    advice = "give a folder with pictures in it, a zip of some, or the name of a dataset on the hub"
    if path.exists() or path.is_symlink():
        found = find_kind(path)
        raise UserError(
            f"{wording.setting} {data.source!r}: there must be a folder (found {found}); {advice}."
        )
    # no hub name looks like these, so there is no need to ask the hub
    several = data.source.count("/") > 1 and not data.source.startswith(REMOTE)
    if several or data.source.startswith((".", "/", "~")) or path.suffix.lower() == ".zip":
        raise UserError(f"{wording.setting} {data.source!r}: there is no such folder; {advice}.")


def _open_pictures(data: Data, folder: Entry, wording: Wording, notes: Notes) -> FolderRows:
    """Open a folder of pictures, whose folders are splits if the recipe's split is one of them."""
    names = re.findall(r"(?:^|\+)\s*(\w[\w.-]*)", data.split)
    folders = {} if holds_pictures(folder) else {each.name: each for each in find_folders(folder)}
    chosen = {name: folders[name] for name in names if name in folders} or {"train": folder}
    if folder not in chosen.values():
        others = (name for name in folders if name not in chosen)
        notes.add_all(f"Left out, as data.split is {data.split!r}: the folders", others)
    splits = {name: list_folder(data, each, wording, notes).rows for name, each in chosen.items()}
    rows = _select_rows(data, splits, wording)
    if not rows:
        raise UserError(
            f"{wording.setting} {data.source!r} has no pictures (found {_describe(folder)}); put"
            " some there, as PNG, JPEG, WebP, AVIF, HEIC or TIFF, or name another folder."
        )
    for setting in ("config", "revision"):
        if getattr(data, setting) is not None:
            notes.add("Without effect on a folder of pictures:", f"data.{setting}")
    return FolderRows(data, rows, wording, notes)


def _select_rows(data: Data, splits: dict[str, list[Row]], wording: Wording) -> Sequence[Row]:
    """Select the rows of a split, such as ``train[:10]``."""
    try:
        parts = ReadInstruction.from_spec(data.split).to_absolute(
            {name: len(rows) for name, rows in splits.items()}
        )
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{wording.setting} {data.source!r} has no split {data.split!r}; it has"
            f" {listed(splits)}, and parts such as train[:10]."
        ) from error
    return [row for part in parts for row in splits[part.splitname][part.from_ : part.to]]


def _describe(folder: Entry) -> str:
    names = sorted(f"{each.name}/" if each.is_dir() else each.name for each in folder.iterdir())
    return listed(names, 4) or "nothing"
