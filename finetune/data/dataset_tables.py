"""Datasets with columns of pictures and captions, opened with the `datasets` library."""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.utils import logging as hub_logging

from adapters.atomic import temporary_folder, writing_to
from adapters.errors import UserError, first_line, listed
from adapters.input_files import read_bytes
from finetune.data.notes import Notes
from finetune.data.rows import Wording, check_caption
from finetune.recipe.schema import Data

PICTURE_FEATURES = (
    datasets.Value("string"),
    datasets.Value("large_string"),
    datasets.Value("binary"),
    datasets.Value("large_binary"),
    {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
)
"""The features, apart from ``datasets.Image``, of columns that are read as pictures."""

CAPTION_FEATURES = (datasets.Value("string"), datasets.Value("large_string"))
"""The features of columns that are read as captions."""

SUFFIXES = {".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".tar", ".lance"}
"""The endings of the files of a local dataset."""

READ_ANEW_BYTES = 2**28
"""The size up to which a local dataset is read anew each time. The cache of ``datasets`` tells
files apart by their times alone, and believes whatever a damaged file of its own says."""


def has_tables(folder: Path) -> bool:
    """Tell whether a dataset's files are in a folder or below it."""
    return any(True for _ in _find_tables(folder))


def _find_tables(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(place, name)


def is_saved(folder: Path) -> bool:
    """Tell whether ``save_to_disk`` wrote a folder."""
    names = (
        datasets.config.DATASET_STATE_JSON_FILENAME,
        datasets.config.DATASETDICT_JSON_FILENAME,
    )
    return any((folder / name).exists() for name in names)


def open_table(
    data: Data, folder: Path | None, cache_dir: Path, wording: Wording, notes: Notes
) -> "TableRows":
    """Open a local folder's dataset, or one on the hub.

    Raises:
        UserError: if it cannot be loaded, or has no rows.
    """
    with _explaining(data, folder, wording):
        if folder is None:
            table = datasets.load_dataset(
                data.source, data.config, split=data.split, revision=data.revision
            )
        elif is_saved(folder):
            table = _load_saved(data, folder)
        else:
            table = _load_files(data, folder, cache_dir, wording)
    if not len(table):
        raise UserError(f"{wording.setting} {data.source!r}, split {data.split!r}, has no rows.")
    return TableRows(data, table, folder, wording, notes)


@contextmanager
def _explaining(data: Data, folder: Path | None, wording: Wording) -> Iterator[None]:
    """Turn whatever ``datasets`` raises into a sentence, and keep it from logging more."""
    libraries = (datasets.logging, hub_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # its readers let through all that their own libraries raise
        reason = first_line(error.__cause__ or error)
        remote = (
            "give a folder with pictures in it, or the name of a dataset on the hub, and log in"
            " with `hf auth login` if it is a private one"
        )
        advice = remote if folder is None else "correct its files, or give a folder of pictures"
        raise UserError(
            f"{wording.setting} {data.source!r}, split {data.split!r}, cannot be loaded"
            f" ({type(error).__name__}: {reason:.300}): {advice}."
        ) from error
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


def _load_saved(data: Data, folder: Path) -> datasets.Dataset:
    saved = datasets.load_from_disk(folder)
    if isinstance(saved, datasets.Dataset):
        return saved
    if data.split not in saved:
        raise LookupError(f"its splits are {listed(saved)}")
    return saved[data.split]


def _load_files(data: Data, folder: Path, cache_dir: Path, wording: Wording) -> datasets.Dataset:
    place = str(folder.resolve())
    if glob.has_magic(place) or "::" in place:
        raise UserError(
            f"{wording.setting} {place}: the names of a dataset's folder and of those above it must"
            " have none of * ? [ :: as datasets takes these for patterns; rename it."
        )
    options = {"split": data.split, "revision": data.revision}
    if sum(file.stat().st_size for file in _find_tables(folder)) > READ_ANEW_BYTES:
        return datasets.load_dataset(place, data.config, **options)
    with writing_to(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
    with temporary_folder(cache_dir) as temporary:
        return datasets.load_dataset(
            place, data.config, cache_dir=str(temporary), keep_in_memory=True, **options
        )


class TableRows:
    """The rows of a dataset."""

    def __init__(
        self,
        data: Data,
        table: datasets.Dataset,
        folder: Path | None,
        wording: Wording,
        notes: Notes,
    ) -> None:
        self.notes = notes
        self._data, self._table, self._wording = data, table, wording
        self._folder = folder or Path()
        self._images: datasets.Dataset | None = None

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._table)

    def read_captions(self) -> list[str]:
        """Read the captions, as :meth:`finetune.data.rows.Rows.read_captions`."""
        data = self._data
        if data.prompt is not None:
            return [data.prompt] * len(self)
        self._check_column("caption_column", data.caption_column, CAPTION_FEATURES)
        column = f", column {data.caption_column!r}"
        return [
            check_caption(caption, f"{self._name(row)}{column}", self._wording)
            for row, caption in enumerate(self._table[data.caption_column])
        ]

    def read_picture(self, row: int) -> tuple[str, bytes]:
        """Read a picture, as :meth:`finetune.data.rows.Rows.read_picture`."""
        image = self._undecoded[row][self._data.image_column]
        if image is None:
            raise UserError(f"{self._name(row)}: there is no picture; add it, or remove the row.")
        if image["bytes"] is not None:
            return image["path"] or self._name(row), image["bytes"]
        file = self._folder / image["path"]
        advice = f"{self._name(row)} names it: put it there, or correct the name"
        return image["path"], read_bytes(file, advice)

    def _name(self, row: int) -> str:
        return f"{self._wording.setting} {self._data.source}, row {row}"

    @property
    def _undecoded(self) -> datasets.Dataset:
        if self._images is None:
            column = self._data.image_column
            self._check_column("image_column", column, PICTURE_FEATURES)
            images = self._table.select_columns([column])
            self._images = images.cast_column(column, datasets.Image(decode=False))
        return self._images

    def _check_column(self, setting: str, name: str, features: Sequence[Any]) -> None:
        source, advice = self._data.source, self._wording.advise_column(setting)
        if name not in self._table.features:
            raise UserError(
                f"{self._wording.setting} {source!r} has no column {name!r}; it has"
                f" {listed(self._table.column_names)}: rename one{advice}."
            )
        feature = self._table.features[name]
        is_picture = isinstance(feature, datasets.Image) and setting == "image_column"
        if not is_picture and feature not in features:
            kind = "pictures" if setting == "image_column" else "text"
            raise UserError(
                f"{self._wording.setting} {source!r}: the column {name!r} must hold {kind} (found"
                f" {feature!s:.100}): correct it{advice}."
            )
