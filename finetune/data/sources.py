"""Sources of pictures and captions, opened with the `datasets` library and read row by row."""

import codecs
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from adapters.atomic import temporary_folder, writing_to
from adapters.errors import UserError
from adapters.texts import find_flaw
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

TEXT_SUFFIXES = (".csv", ".jsonl")
"""The suffixes of metadata files that are text."""

LOADING_ERRORS = (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError)
"""The errors that ``datasets`` raises if a source is missing, malformed or out of reach."""


def load_captions(data: Data, cache_dir: Path) -> list[str]:
    """Load the captions of :func:`finetune.data.pictures.load_pictures`, but no picture."""
    return read_captions(data, open_source(data, cache_dir))


def has_captions(folder: Path) -> bool:
    """Tell whether a folder of pictures has captions of its own."""
    pictures = _list_pictures(folder) if folder.is_dir() else []
    beside = any(picture.with_suffix(".txt").is_file() for picture in pictures)
    return beside or _find_metadata(folder) is not None


def open_source(data: Data, cache_dir: Path) -> datasets.Dataset:
    """Open the dataset that a recipe names, without decoding its pictures.

    A folder with pictures or a metadata file directly in it is one split, ``train``, whatever the
    files' names; ``datasets`` interprets every other source.
    """
    try:
        table = _load(data, Path(data.source).expanduser(), cache_dir)
    except LOADING_ERRORS as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"data.source {data.source!r}, split {data.split!r}, cannot be loaded"
            f" ({reason[0].rstrip('.')}): give a folder with pictures in it, or a dataset that"
            " datasets.load_dataset finds."
        ) from error
    if not len(table):
        raise UserError(f"data.source {data.source!r}, split {data.split!r}, has no pictures.")
    return table


def _load(data: Data, folder: Path, cache_dir: Path) -> datasets.Dataset:
    if (folder / datasets.config.DATASET_STATE_JSON_FILENAME).is_file():
        return datasets.load_from_disk(folder)
    if (folder / datasets.config.DATASETDICT_JSON_FILENAME).is_file():
        splits = datasets.load_from_disk(folder)
        if data.split not in splits:
            raise LookupError(f"its splits are {', '.join(splits)}")
        return splits[data.split]
    if folder.is_dir() and (_find_metadata(folder) or _list_pictures(folder)):
        return _load_picture_folder(data, folder, cache_dir)
    if folder.is_dir() and not any(folder.iterdir()):
        raise FileNotFoundError("the folder is empty")
    # no hub name looks like these, so there is no need to ask the hub
    remote = data.source.startswith(("hf://", "buckets/"))
    is_path = data.source.startswith((".", "/", "~")) or (data.source.count("/") > 1 and not remote)
    if is_path and not folder.exists():
        raise FileNotFoundError("there is no such folder")
    source = str(folder) if folder.exists() else data.source
    return datasets.load_dataset(source, data.config, split=data.split, revision=data.revision)


def _load_picture_folder(data: Data, folder: Path, cache_dir: Path) -> datasets.Dataset:
    metadata = _find_metadata(folder)
    if metadata and metadata.suffix in TEXT_SUFFIXES:
        read_text(metadata)  # checks the encoding: datasets does not say which it found
    files = [metadata] if metadata else _list_pictures(folder)
    # its paths and captions are read anew each time, which takes no longer than looking for them,
    # as the library would believe whatever a damaged file of its cache says
    with writing_to(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
    with temporary_folder(cache_dir) as temporary:
        table = datasets.load_dataset(
            "imagefolder",
            data_files={"train": [glob.escape(str(file.resolve())) for file in files]},
            split=data.split,
            drop_labels=True,
            cache_dir=str(temporary),
            keep_in_memory=True,
        )
    if metadata or data.prompt is not None:
        return table
    undecoded = table.cast_column("image", datasets.Image(decode=False))
    captions = [_read_text_beside(Path(row["image"]["path"])) for row in undecoded]
    return table.add_column(data.caption_column, captions)


def _read_text_beside(picture: Path) -> str:
    text = picture.with_suffix(".txt")
    if not text.is_file():
        raise UserError(
            f"The picture {picture} has no caption: write {text.name} next to it, list all pictures"
            " in a metadata.jsonl, or give data.prompt for all."
        )
    caption = read_text(text)
    if flaw := find_flaw(caption):
        raise UserError(f"The caption {text} {flaw}.")
    return caption


def read_text(file: Path) -> str:
    """Read a file in UTF-8, dropping any byte-order mark.

    Raises:
        UserError: if the file is in another encoding.
    """
    content = file.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        found = "UTF-16"
    else:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            found = f"byte 0x{content[error.start]:02x} in line {line}, as Windows-1252 has"
    raise UserError(f"{file} must be text in UTF-8 (found {found}); save it as UTF-8.")


def read_captions(data: Data, table: datasets.Dataset) -> list[str]:
    """Read the caption of each row, without the white space around it."""
    if data.prompt is not None:
        return [data.prompt] * len(table)
    _check_column(data, table, "caption_column", CAPTION_FEATURES)
    captions = [(caption or "").strip() for caption in table[data.caption_column]]
    for row, caption in enumerate(captions):
        if flaw := find_flaw(caption):
            raise UserError(
                f"data.source {data.source!r}: the caption of row {row}, in column"
                f" {data.caption_column!r}, {flaw}, or give data.prompt for all pictures"
                " (data.caption_dropout trains the empty caption)."
            )
    return captions


def _find_metadata(folder: Path) -> Path | None:
    files = (folder / name for name in ImageFolder.METADATA_FILENAMES)
    return next((file for file in files if file.is_file()), None)


def _list_pictures(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in ImageFolder.EXTENSIONS and not file.name.startswith(".")
    )


def select_pictures(data: Data, table: datasets.Dataset) -> datasets.Dataset:
    """Select only the column of pictures, undecoded.

    Raises:
        UserError: if there is no such column, or if it does not hold pictures.
    """
    _check_column(data, table, "image_column", PICTURE_FEATURES)
    images = table.select_columns([data.image_column])
    return images.cast_column(data.image_column, datasets.Image(decode=False))


def _check_column(data: Data, table: datasets.Dataset, field: str, features: Sequence[Any]) -> None:
    name = {"image_column": data.image_column, "caption_column": data.caption_column}[field]
    if name not in table.features:
        raise UserError(
            f"data.{field}: {data.source!r} has no column {name!r}; it has"
            f" {', '.join(table.column_names)}."
        )
    feature = table.features[name]
    is_picture = isinstance(feature, datasets.Image) and field == "image_column"
    if not is_picture and feature not in features:
        kind = "pictures" if field == "image_column" else "text"
        raise UserError(
            f"data.{field}: column {name!r} of {data.source!r} must hold {kind} (got {feature})."
        )


def read_content(image: dict[str, Any] | None, row: str) -> tuple[str, bytes]:
    """Read an undecoded picture: its path (or the row's name) and the bytes of its file."""
    if image is None:
        raise UserError(f"There is no picture in {row}.")
    source, content = image["path"] or row, image["bytes"]
    if content is not None:
        return source, content
    try:
        return source, Path(source).read_bytes()
    except OSError as error:
        raise UserError(
            f"The picture {source}, named in {row}, cannot be read ({error.strerror}); put it there"
            " or correct the name."
        ) from error
