"""Pictures and captions: read through the `datasets` library, decoded once, cropped as IF's were.

A picture is decoded into 8-bit RGB arrays that lie in the cache under the hash of its file, a large
one in a reduction for each size of crop; they are mapped into memory from there, and a step reads
no more of them than its crop.
"""

import codecs
import glob
import hashlib
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from adapters.captions import find_invisible
from adapters.errors import UserError
from adapters.files import replacing
from adapters.reading import DECODING_ERRORS, plain
from finetune.recipe import Data

SPARE_RESOLUTION = 4
"""A picture is cached with a short side of at least this many times the crop's."""

PICTURE_FEATURES = (
    datasets.Value("string"),
    datasets.Value("large_string"),
    datasets.Value("binary"),
    datasets.Value("large_binary"),
    {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
)
"""What a column may hold beside ``datasets.Image`` and still be read as pictures."""

CAPTION_FEATURES = (datasets.Value("string"), datasets.Value("large_string"))
"""What a column of captions may hold."""

TEXT_SUFFIXES = (".csv", ".jsonl")
"""The kinds of metadata files that are text."""

LOADING_ERRORS = (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError)
"""What ``datasets`` raises where a source is missing, malformed or out of reach."""


@dataclass(frozen=True)
class Picture:
    """One captioned picture; its pixels lie in the cache."""

    file: Path
    """The decoded picture in the cache, a ``.npy`` file: for the largest crops."""
    caption: str
    source: str
    """Where it came from: its path, or the dataset and row."""
    reduced: Mapping[int, Path] = field(default_factory=dict)
    """The same for smaller crops, by their side in pixels."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """[H, W, 3] RGB for the largest crops, mapped from the cache and read-only."""
        return _map(self.file)

    def pixels_for(self, size_px: int) -> NDArray[np.uint8]:
        """The pixels that crops of a size are taken from, whatever other sizes are cropped."""
        return _map(self.reduced.get(size_px, self.file))


def _map(file: Path) -> NDArray[np.uint8]:
    """Map a file, each time again: a map keeps its file open, and few files may be."""
    return np.load(file, mmap_mode="r", allow_pickle=False)


def load_pictures(
    data: Data,
    cache_dir: Path,
    size_px: int,
    limit: int | None = None,
    *,
    smaller_px: Sequence[int] = (),
) -> list[Picture]:
    """The pictures of a recipe, each decoded once and kept in the cache for later runs.

    Args:
        data: a folder of pictures captioned by one prompt for all, by ``metadata.jsonl`` or by a
            ``.txt`` beside each; a folder written by ``save_to_disk``; or whatever
            ``datasets.load_dataset`` takes.
        cache_dir: the recipe's cache.
        size_px: the largest crop that will be taken; far larger pictures are cached reduced.
        limit: how many pictures to read at most, from the first on; ``None``: all.
        smaller_px: the other crops that will be taken, each from a reduction of its own.

    Raises:
        UserError: where the source, its columns, a caption or a picture is missing or damaged.
    """
    table = open_source(data, cache_dir)
    captions = read_captions(data, table)
    images = _picture_column(data, table)

    def picture(row: int) -> Picture:
        image = images[row][data.image_column]
        source, content = _content(image, f"row {row} of {data.source}")
        files = _decoded(content, source, cache_dir, (size_px, *smaller_px))
        return Picture(files.pop(size_px), captions[row], source, files)

    rows = range(len(table))[:limit]
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(picture, rows), "Reading pictures", len(rows), delay=2))


def load_captions(data: Data, cache_dir: Path) -> list[str]:
    """The captions that :func:`load_pictures` gives, without reading a picture."""
    return read_captions(data, open_source(data, cache_dir))


def crop(
    picture: Picture,
    size_px: int,
    rng: np.random.Generator,
    *,
    center_shift: float,
    horizontal_flip: bool,
) -> Image.Image:
    """A square crop of [size_px, size_px], augmented as IF's pictures were (its model cards).

    The crop is the largest square that fits. Its centre moves from the picture's along the longer
    side, uniformly by up to ``center_shift`` of the crop's side and never out of the picture, so a
    square picture is taken whole. It is resized with Pillow's BICUBIC and ``reducing_gap=None``.

    Args:
        picture: what to crop.
        size_px: the side of the result.
        rng: draws the shift and the flip; two numbers, whatever the picture.
        center_shift: as a fraction of the crop's side; 0: the centre.
        horizontal_flip: mirror every other picture.
    """
    shift, flip = rng.uniform(-1, 1), rng.random() < 0.5
    pixels = picture.pixels_for(size_px)
    height, width = pixels.shape[:2]
    side, margin = min(height, width), abs(height - width) / 2
    start = round(margin + shift * min(center_shift * side, margin))
    left, top = (start, 0) if width > height else (0, start)
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    image = square.resize((size_px, size_px), Image.Resampling.BICUBIC, reducing_gap=None)
    return ImageOps.mirror(image) if horizontal_flip and flip else image


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as [3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def has_captions(folder: Path) -> bool:
    """Whether a folder of pictures brings captions of its own."""
    pictures = _pictures_in(folder) if folder.is_dir() else []
    beside = any(picture.with_suffix(".txt").is_file() for picture in pictures)
    return beside or _metadata(folder) is not None


def open_source(data: Data, cache_dir: Path) -> datasets.Dataset:
    """The dataset that a recipe names; pictures are not decoded.

    Pictures or a metadata file directly in a folder make it one split, ``train``, whatever the
    files' names; all else is left to ``datasets`` to find out.
    """
    folder = Path(data.source).expanduser()
    load = _load_dataset
    if (folder / datasets.config.DATASET_STATE_JSON_FILENAME).is_file():
        load = _load_saved
    elif (folder / datasets.config.DATASETDICT_JSON_FILENAME).is_file():
        load = _load_saved_splits
    elif folder.is_dir() and (_metadata(folder) or _pictures_in(folder)):
        load = _load_picture_folder
    try:
        table = load(data, folder, cache_dir)
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


def read_captions(data: Data, table: datasets.Dataset) -> list[str]:
    """The caption of each row, with white space around it removed."""
    if data.prompt is not None:
        return [data.prompt] * len(table)
    _check_column(data, table, "caption_column", CAPTION_FEATURES)
    captions = [(caption or "").strip() for caption in table[data.caption_column]]
    for row, caption in enumerate(captions):
        invisible = find_invisible(caption)
        if not caption or invisible:
            kind = f"invisible caption ({invisible})" if invisible else "empty caption"
            raise UserError(
                f"data.source {data.source!r}: row {row} has an {kind} in column"
                f" {data.caption_column!r}; write one, or give data.prompt for all pictures"
                " (pictures for the empty caption come from data.caption_dropout)."
            )
    return captions


def _load_dataset(data: Data, folder: Path, cache_dir: Path) -> datasets.Dataset:
    if folder.is_dir() and not any(folder.iterdir()):
        raise FileNotFoundError("the folder is empty")
    if not folder.exists() and _names_a_folder(data.source):
        raise FileNotFoundError("there is no such folder")
    source = str(folder) if folder.exists() else data.source
    return datasets.load_dataset(source, data.config, split=data.split, revision=data.revision)


def _names_a_folder(source: str) -> bool:
    """Whether a source is written as no hub name can be, so that the hub need not be asked."""
    remote = source.startswith(("hf://", "buckets/"))
    return source.startswith((".", "/", "~")) or (source.count("/") > 1 and not remote)


def _load_saved(data: Data, folder: Path, cache_dir: Path) -> datasets.Dataset:
    return datasets.load_from_disk(folder)


def _load_saved_splits(data: Data, folder: Path, cache_dir: Path) -> datasets.Dataset:
    splits = datasets.load_from_disk(folder)
    if data.split not in splits:
        raise LookupError(f"its splits are {', '.join(splits)}")
    return splits[data.split]


def _load_picture_folder(data: Data, folder: Path, cache_dir: Path) -> datasets.Dataset:
    metadata = _metadata(folder)
    if metadata and metadata.suffix in TEXT_SUFFIXES:
        read_text(metadata)  # says what datasets would not
    files = [metadata] if metadata else _pictures_in(folder)
    table = datasets.load_dataset(
        "imagefolder",
        data_files={"train": [glob.escape(str(file.resolve())) for file in files]},
        split=data.split,
        drop_labels=True,
        cache_dir=str(cache_dir / "tables"),
    )
    if metadata or data.prompt is not None:
        return table
    undecoded = table.cast_column("image", datasets.Image(decode=False))
    captions = [_text_beside(Path(row["image"]["path"])) for row in undecoded]
    return table.add_column(data.caption_column, captions)


def _text_beside(picture: Path) -> str:
    text = picture.with_suffix(".txt")
    if not text.is_file():
        raise UserError(
            f"The picture {picture} has no caption: write {text.name} beside it, list all pictures"
            " in a metadata.jsonl, or give data.prompt for all."
        )
    caption = read_text(text)
    if not caption or find_invisible(caption):
        found = find_invisible(caption) or "no characters"
        raise UserError(f"The caption {text} is empty (found {found}); write one.")
    return caption


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, without a byte-order mark.

    Raises:
        UserError: where it is in another encoding.
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


def _metadata(folder: Path) -> Path | None:
    files = (folder / name for name in ImageFolder.METADATA_FILENAMES)
    return next((file for file in files if file.is_file()), None)


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in ImageFolder.EXTENSIONS and not file.name.startswith(".")
    )


def _picture_column(data: Data, table: datasets.Dataset) -> datasets.Dataset:
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


def _content(image: dict[str, Any] | None, row: str) -> tuple[str, bytes]:
    """Where an undecoded picture came from, and the bytes of its file."""
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


def _decoded(
    content: bytes, source: str, cache_dir: Path, sizes_px: Sequence[int]
) -> dict[int, Path]:
    """The decoded picture in the cache for each size of crop; decodes it where one is missing."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            digest = hashlib.sha256(content).hexdigest()
            reductions = {size_px: _reduction(min(image.size), size_px) for size_px in sizes_px}
            files = {r: cache_dir / "pictures" / f"{digest}-{r}.npy" for r in reductions.values()}
            if missing := [r for r, file in files.items() if not file.exists()]:
                for reduction, pixels in zip(missing, decode(image, missing), strict=True):
                    with replacing(files[reduction]) as temporary:
                        np.save(temporary, pixels, allow_pickle=False)
    except UnidentifiedImageError as error:
        raise UserError(
            f"The picture {source} is damaged or of an unknown format; remove or replace it."
        ) from error
    except DECODING_ERRORS as error:
        raise UserError(f"The picture {source} is damaged ({error}); replace it.") from error
    return {size_px: files[reduction] for size_px, reduction in reductions.items()}


def _reduction(short_side: int, size_px: int) -> int:
    """The integer factor by which a picture is reduced in the cache; 1 for all but huge ones."""
    factor = short_side // (SPARE_RESOLUTION * size_px)
    return factor if factor > 1 else 1


def decode(image: Image.Image, reductions: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Decode a picture, turn it upright, flatten it on white, and average it over boxes.

    Args:
        image: the opened file.
        reductions: widths and heights of the boxes in pixels; those that the right and lower edge
            would cut are left out.

    Returns:
        [H, W, 3] RGB for each reduction.
    """
    image = plain(image)

    def reduce(reduction: int) -> NDArray[np.uint8]:
        width, height = (side - side % reduction for side in image.size)
        return np.asarray(image.reduce(reduction, box=(0, 0, width, height)))

    return [reduce(reduction) for reduction in reductions]
