"""Folders and zips of pictures: the pictures in them and in the folders below, with their captions.

A folder with a list, such as ``metadata.jsonl``, has the pictures that the list names. In any other
one each picture has its caption in a text file beside it. Names are taken as they are written, and
soft links as what they lead to; hidden files do not count.
"""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TypeAlias

import pyarrow
from pyarrow import parquet

from adapters.errors import UserError, first_line, listed
from adapters.input_files import ZIP_ERRORS, Entry, find_obstacle, read_bytes, read_text
from adapters.pictures.reading import picture_suffixes
from finetune.data.notes import Notes
from finetune.data.rows import Wording, check_caption
from finetune.recipe.schema import Data

FILE_NAME = "file_name"
"""The column of a list that names pictures in the column ``image``."""

ZIP, TEXT = ".zip", ".txt"

UNMENTIONED = {".md", ".txt", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".npz", ".npy", ZIP}
"""The endings of files beside pictures about which nothing is said."""

LITTER = {"__MACOSX", "Thumbs.db", "desktop.ini"}
"""The names of what systems leave in folders, apart from hidden files."""

DEEPEST = 16
"""The most folders and zips in one another."""

LONGEST_QUOTE = 60

Line: TypeAlias = tuple[str, dict[str, Any]]
"""A place in a list, in words, and its fields."""


@dataclass(frozen=True)
class Row:
    """A picture of a folder."""

    file: Entry
    place: str
    """Its line in a list, or its path."""
    caption: Any = None
    """Its caption in the list, as it stands there."""
    in_list: bool = False
    """True if it is in a list, and has no text file therefore."""


@dataclass
class Listing:
    """The pictures of a folder, in order, and what of it is not read."""

    data: Data
    wording: Wording
    notes: Notes
    rows: list[Row] = field(default_factory=list)

    @property
    def has_captions(self) -> bool:
        """True if any picture has a caption of its own."""
        return any(
            row.caption is not None if row.in_list else find_text(row.file) is not None
            for row in self.rows
        )


class FolderRows:
    """The rows of a folder of pictures."""

    def __init__(self, data: Data, rows: Sequence[Row], wording: Wording, notes: Notes) -> None:
        self.notes = notes
        self._data, self._rows, self._wording = data, rows, wording

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._rows)

    def read_captions(self) -> list[str]:
        """Read the captions, as :meth:`finetune.data.rows.Rows.read_captions`."""
        if self._data.prompt is None:
            return [self._read_caption(row) for row in self._rows]
        for row in self._rows:
            if own := (row.caption and row.place) if row.in_list else find_text(row.file):
                self.notes.add("Not read, as data.prompt is the caption of all pictures:", own)
        return [self._data.prompt] * len(self)

    def _read_caption(self, row: Row) -> str:
        if row.in_list:
            return check_caption(row.caption, row.place, self._wording)
        text = find_text(row.file)
        if text is None:
            name = f"{Path(row.file.name).stem}{TEXT}"
            raise UserError(
                f"The picture {row.file} has no caption: write {name} next to it, list all"
                f" pictures in a metadata.jsonl, {self._wording.caption_advice}."
            )
        return check_caption(read_text(text), str(text), self._wording)

    def read_picture(self, row: int) -> tuple[str, bytes]:
        """Read a picture, as :meth:`finetune.data.rows.Rows.read_picture`."""
        file = self._rows[row].file
        return str(file), read_bytes(file)


def open_folder(path: Path) -> Entry | None:
    """Open a folder, or a zip as a folder; ``None``: it is neither.

    Raises:
        UserError: if the zip is damaged.
    """
    if path.is_dir():
        return path
    if path.suffix.lower() == ZIP and path.is_file():
        return _open_zip(path)
    return None


def _open_zip(entry: Entry) -> Entry:
    content = entry if isinstance(entry, Path) else io.BytesIO(read_bytes(entry))
    try:
        file = zipfile.ZipFile(content)
    except ZIP_ERRORS as error:
        raise UserError(f"{entry} is not a whole zip ({error}); pack it again.") from error
    file.filename = str(entry)  # a zip in a zip has none
    return zipfile.Path(file)


def holds_pictures(folder: Entry) -> bool:
    """Tell whether pictures, a list of them or a zip are directly in a folder."""
    files = [entry for entry in _list_visible(folder) if not entry.is_dir()]
    suffixes = {Path(file.name).suffix.lower() for file in files}
    named = not READERS.keys().isdisjoint(file.name for file in files)
    return named or not suffixes.isdisjoint(picture_suffixes() | {ZIP})


def find_folders(folder: Entry) -> list[Entry]:
    """Find the folders directly in a folder."""
    return [entry for entry in _list_visible(folder) if entry.is_dir()]


def list_folder(data: Data, folder: Entry, wording: Wording, notes: Notes) -> Listing:
    """List the pictures of a folder and of those below it, without reading them.

    Raises:
        UserError: if a list is malformed, or names what is not there.
    """
    listing = Listing(data, wording, notes)
    _add_folder(folder, listing, ())
    return listing


def _add_folder(folder: Entry, listing: Listing, above: Sequence[Entry]) -> None:
    entries = _list_visible(folder)
    lists = [entry for name in READERS for entry in entries if entry.name == name]
    files = [entry for entry in entries if not entry.is_dir() and entry not in lists]
    pictures, path = _select_pictures(files), (*above, folder)
    if lists:
        rows = _read_list(lists[0], folder, listing)
        listing.rows += rows
        below = (_find_pictures(each, path) for each in _open_below(entries, path))
        _note_unlisted(lists, rows, chain(pictures, *below), listing.notes)
        return
    for picture in pictures:
        if isinstance(picture, Path) and (obstacle := find_obstacle(picture)):
            raise UserError(f"The picture {picture}: {obstacle}; replace or remove it.")
    listing.rows += [Row(picture, str(picture)) for picture in pictures]
    _note_others(files, pictures, listing.notes)
    for each in _open_below(entries, path):
        _add_folder(each, listing, path)


def _list_visible(folder: Entry) -> list[Entry]:
    shown = (e for e in folder.iterdir() if e.name[:1] != "." and e.name not in LITTER)
    return sorted(shown, key=lambda entry: entry.name)


def _select_pictures(files: Iterable[Entry]) -> list[Entry]:
    suffixes = picture_suffixes()
    return [file for file in files if Path(file.name).suffix.lower() in suffixes]


def _open_below(entries: Iterable[Entry], path: Sequence[Entry]) -> Iterator[Entry]:
    """Yield the folders and zips among entries, but no soft links that lead back up.

    Args:
        entries: what is in a folder.
        path: the folder, and those that it is in.
    """
    for entry in entries:
        is_zip = Path(entry.name).suffix.lower() == ZIP and entry.is_file()
        if not is_zip and not entry.is_dir():
            continue
        if len(path) >= DEEPEST:
            raise UserError(f"{entry} is the {DEEPEST}th folder in one another; move it up.")
        if is_zip:
            yield _open_zip(entry)
        elif not isinstance(entry, Path) or not any(
            isinstance(each, Path) and each.samefile(entry) for each in path
        ):
            yield entry


def _find_pictures(folder: Entry, above: Sequence[Entry]) -> Iterator[Entry]:
    """Find the pictures in and below a folder, whatever lists are there."""
    entries, path = _list_visible(folder), (*above, folder)
    yield from _select_pictures(entry for entry in entries if not entry.is_dir())
    for each in _open_below(entries, path):
        yield from _find_pictures(each, path)


def _note_unlisted(
    lists: Sequence[Entry], rows: Iterable[Row], pictures: Iterable[Entry], notes: Notes
) -> None:
    """Note what a list leaves out: pictures, text files beside them, other lists."""
    named = {str(row.file) for row in rows}
    for picture in pictures:
        if str(picture) not in named:
            notes.add(f"Left out, as {lists[0]} does not list them:", picture)
        elif text := find_text(picture):
            notes.add(f"Not read, as {lists[0]} has the captions:", text)
    notes.add_all(f"Not read, as {lists[0]} has the captions:", lists[1:])


def _note_others(files: Iterable[Entry], pictures: Iterable[Entry], notes: Notes) -> None:
    """Note files that are neither pictures nor captions of any."""
    names = {picture.name for picture in pictures}
    stems = {Path(name).stem for name in names}
    for file in files:
        suffix = Path(file.name).suffix.lower()
        if suffix == TEXT and names and Path(file.name).stem not in stems:
            notes.add("Not read, as no picture has this name:", file)
        elif file.name not in names and suffix not in UNMENTIONED:
            notes.add("Left out, as no pictures are of this kind:", file)


def find_text(picture: Entry) -> Entry | None:
    """Find the text file beside a picture."""
    beside: Any = picture.parent  # of either kind; mypy knows no common one
    for suffix in (TEXT, TEXT.upper()):
        file: Entry = beside / f"{Path(picture.name).stem}{suffix}"
        if file.exists() or (isinstance(file, Path) and file.is_symlink()):
            return file
    return None


def _read_list(file: Entry, folder: Entry, listing: Listing) -> list[Row]:
    """Read a list of pictures."""
    data, wording, rows = listing.data, listing.wording, []
    named = FILE_NAME if data.image_column == "image" else f"{data.image_column}_{FILE_NAME}"
    needed = {named: "image_column"}
    if data.prompt is None:
        needed[data.caption_column] = "caption_column"
    for place, fields in READERS[file.name](file):
        for name, setting in needed.items():
            if name not in fields:
                raise UserError(
                    f"{place}: there must be a field {name!r} (found"
                    f" {listed(map(repr, fields), 8)}); add it{wording.advise_column(setting)}."
                )
        picture = _find_file(folder, fields[named], f"{place}: {named}")
        rows.append(Row(picture, place, fields.get(data.caption_column), in_list=True))
    if not rows:
        raise UserError(f"{file} lists no pictures; write a line for each, or remove it.")
    return rows


def _find_file(folder: Any, name: Any, place: str) -> Entry:
    """Find the file that a list names, which must be in the list's folder or below."""
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{place} must be a file's name (found {_quote(name)}); correct it.")
    path = PurePosixPath(name)
    if "\0" in name or path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{place} must be a path below {folder} (found {_quote(name)}); put the picture there,"
            " and name it from there."
        )
    files: list[Entry] = [folder / name, folder / name.replace("\\", "/")]  # as Windows writes it
    file = next((each for each in files if _is_there(each)), files[0])
    obstacle = None
    if isinstance(file, Path):
        obstacle = find_obstacle(file)
    elif not file.is_file():
        obstacle = "there must be a file (found nothing)"
    if obstacle:
        raise UserError(
            f"{place} names {file}: {obstacle}; put the picture there, or correct the name."
        )
    return file


def _is_there(entry: Entry) -> bool:
    return find_obstacle(entry) is None if isinstance(entry, Path) else entry.is_file()


def _read_jsonl(file: Entry) -> Iterator[Line]:
    # not splitlines: to it some characters of a text are line breaks
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        place, reason = f"{file}, line {number}", ""
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            fields, reason = None, f": {first_line(error)}"
        if not isinstance(fields, dict):
            raise UserError(
                f"{place}: there must be one JSON object (found {_quote(line)}{reason}); correct"
                " it."
            )
        yield place, fields


def _read_csv(file: Entry) -> Iterator[Line]:
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        for fields in reader:
            place = f"{file}, line {reader.line_num}"
            if None in fields or None in fields.values():
                raise UserError(
                    f"{place}: there must be {len(reader.fieldnames or ())} fields, as in the first"
                    ' line; put texts with commas in "quotes".'
                )
            yield place, fields
    except csv.Error as error:
        raise UserError(
            f"{file}, line {reader.reader.line_num}: this is not CSV ({error}); correct it."
        ) from error


def _read_parquet(file: Entry) -> Iterator[Line]:
    try:
        rows = parquet.read_table(pyarrow.BufferReader(read_bytes(file))).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); write it again.") from error
    for number, fields in enumerate(rows):
        yield f"{file}, row {number}", fields


READERS: Mapping[str, Callable[[Entry], Iterator[Line]]] = MappingProxyType(
    {
        "metadata.csv": _read_csv,
        "metadata.jsonl": _read_jsonl,
        "metadata.parquet": _read_parquet,
    }
)
"""The readers of lists of pictures, by name; of several in one folder, the first is read."""


def _quote(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else value
    return f"{text!r:.{LONGEST_QUOTE}}"
