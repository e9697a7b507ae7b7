"""Pictures and captions: every source reads the same, and a crop is what Pillow makes of it."""

import io
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from adapters.errors import UserError
from finetune.data import pictures
from finetune.data.pictures import Picture, crop, load_pictures, to_tensor
from finetune.data.sources import load_captions
from finetune.recipe.schema import Data, Recipe
from tests.builders.random_cascade import RandomCascade

SIZE_PX = 16
CAPTIONS = ("a red cat", "a Blue dog", "<b>two</b> frogs")


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def photo(height: int = 24, width: int = 36, seed: int = 0) -> Image.Image:
    """A picture of smooth shapes with some grain, as a photo has."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 216, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-6, 7, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def save_photos(folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{index} [test].png" for index in range(count)]
    for index, file in enumerate(files):
        photo(seed=index).save(file)
    return files


def with_prompt(folder: Path) -> Data:
    save_photos(folder)
    return Data(source=str(folder), prompt="a sks cat")


def with_metadata(folder: Path) -> Data:
    files = save_photos(folder)
    rows = [{"file_name": f.name, "text": c} for f, c in zip(files, CAPTIONS, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Data(source=str(folder))


def with_text_files(folder: Path) -> Data:
    for file, caption in zip(save_photos(folder), CAPTIONS, strict=True):
        file.with_suffix(".txt").write_text(f" {caption}\n")
    return Data(source=str(folder))


def table(folder: Path) -> datasets.Dataset:
    columns = {"photo": [encoded(Image.open(f)) for f in save_photos(folder)]}
    return datasets.Dataset.from_dict(columns | {"label": list(CAPTIONS), "likes": [1, 2, 3]})


def as_parquet(folder: Path) -> Data:
    table(folder / "photos").to_parquet(folder / "parquet" / "some.parquet")
    return Data(source=str(folder / "parquet"), image_column="photo", caption_column="label")


def as_saved(folder: Path) -> Data:
    pictures = table(folder / "photos").cast_column("photo", datasets.Image())
    pictures.save_to_disk(folder / "saved")
    return Data(source=str(folder / "saved"), image_column="photo", caption_column="label")


def as_saved_splits(folder: Path) -> Data:
    splits = datasets.DatasetDict({"good": table(folder / "photos")})
    splits.save_to_disk(folder / "splits")
    return Data(
        source=str(folder / "splits"), image_column="photo", caption_column="label", split="good"
    )


SOURCES = (with_prompt, with_metadata, with_text_files, as_parquet, as_saved, as_saved_splits)


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_gives_the_same_pictures(make: Callable[[Path], Data], tmp_path: Path) -> None:
    data = make(tmp_path / "source")
    pictures = load_pictures(data, tmp_path / "cache", SIZE_PX)
    expected = [data.prompt] * 3 if data.prompt else list(CAPTIONS)
    assert [picture.caption for picture in pictures] == expected
    assert load_captions(data, tmp_path / "cache") == expected
    for index, picture in enumerate(pictures):
        np.testing.assert_array_equal(picture.pixels, np.asarray(photo(seed=index)))


def test_each_file_is_decoded_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def counting(*arguments: object) -> object:
        decoded.append(arguments)
        return original(*arguments)

    original = pictures.decode
    monkeypatch.setattr(pictures, "decode", counting)
    data = with_metadata(tmp_path / "source")
    first = load_pictures(data, tmp_path / "cache", SIZE_PX)
    for picture in first:
        crop(picture, 8, np.random.default_rng(0), center_shift=0.1, horizontal_flip=True)
    assert len(decoded) == 3
    assert load_pictures(data, tmp_path / "cache", SIZE_PX) == first
    assert len(decoded) == 3
    photo(seed=9).save(tmp_path / "source" / "1 [test].png")
    renewed = load_pictures(data, tmp_path / "cache", SIZE_PX)
    assert len(decoded) == 4
    np.testing.assert_array_equal(renewed[1].pixels, np.asarray(photo(seed=9)))


def test_damaged_pixels_are_decoded_again(tmp_path: Path) -> None:
    data = with_metadata(tmp_path / "source")
    first = load_pictures(data, tmp_path / "cache", SIZE_PX)
    file = first[0].file
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-20] ^= 1  # the last pixel's: the digest has 16
    for content in (b"", whole[:-1], whole[:-16], whole[:40], bytes(len(whole)), bytes(flipped)):
        file.write_bytes(content)
        assert load_pictures(data, tmp_path / "cache", SIZE_PX) == first
        assert file.read_bytes() == whole
    np.testing.assert_array_equal(first[0].pixels, np.asarray(photo(seed=0)))


def test_nothing_is_kept_that_cannot_be_checked(tmp_path: Path) -> None:
    load_pictures(with_metadata(tmp_path / "source"), tmp_path / "cache", SIZE_PX)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["pictures"]


def test_more_pictures_than_files_may_be_open(tmp_path: Path) -> None:
    picture = load_pictures(with_prompt(tmp_path / "source"), tmp_path / "cache", SIZE_PX)[0]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        pictures = [Picture(picture.file, "", "") for _ in range(300)]
        assert all(len(picture.pixels) for picture in pictures)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_pixels_are_read_only(tmp_path: Path) -> None:
    picture = load_pictures(with_prompt(tmp_path / "source"), tmp_path / "cache", SIZE_PX)[0]
    assert isinstance(picture.pixels, np.memmap)
    assert not picture.pixels.flags.writeable


def decoded(content: bytes, tmp_path: Path) -> np.ndarray:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "picture.png").write_bytes(content)
    data = Data(source=str(tmp_path / "source"), prompt="x")
    return load_pictures(data, tmp_path / "cache", SIZE_PX)[0].pixels


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    pixels = decoded(encoded(photo(), exif=exif), tmp_path)
    turned = photo().transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(pixels, np.asarray(turned))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_flattened_on_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (24, 24), (0, 0, 0, 255))
    image.paste((9, 0, 0, 0), (0, 0, 12, 24))
    options = {"transparency": (9, 0, 0)} if mode == "RGB" else {}
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    pixels = decoded(encoded(image, **options), tmp_path)
    assert (pixels[:, :12] == 255).all()
    assert (pixels[:, 12:] == 0).all()


@pytest.mark.parametrize("level", [0, 128 * 257, 65535])
def test_sixteen_bit_grey_keeps_its_range(level: int, tmp_path: Path) -> None:
    image = Image.fromarray(np.full((20, 20), level, dtype=np.uint16))
    pixels = decoded(encoded(image), tmp_path)
    assert pixels.shape == (20, 20, 3)
    assert (pixels == level // 257).all()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    image = photo().convert(mode)
    pixels = decoded(encoded(image, "TIFF"), tmp_path)
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def picture_of(image: Image.Image, folder: Path) -> Picture:
    """A picture that was cached as it is."""
    file = folder / f"{image.width}x{image.height}.npy"
    np.save(file, np.asarray(image))
    return Picture(file, "", "")


@pytest.mark.parametrize("reduction", [2, 6])
def test_huge_pictures_are_reduced_in_the_cache(reduction: int, tmp_path: Path) -> None:
    short = 4 * SIZE_PX * reduction
    huge = photo(short, short + 20 * reduction)
    reduced = decoded(encoded(huge), tmp_path)
    assert reduced.shape == (4 * SIZE_PX, 4 * SIZE_PX + 20, 3)
    pictures = [picture_of(image, tmp_path) for image in (huge, Image.fromarray(np.array(reduced)))]
    crops = [
        crop(picture, SIZE_PX, np.random.default_rng(0), center_shift=0.0, horizontal_flip=False)
        for picture in pictures
    ]
    difference = np.subtract(*[np.asarray(image, dtype=np.int16) for image in crops])
    assert np.abs(difference).max() <= 2


def test_a_stages_pixels_do_not_depend_on_the_other_stage(
    random_cascade: RandomCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crop of each stage, of a photo that is cached in another reduction for either."""
    (tmp_path / "source").mkdir()
    photo(600, 700).save(tmp_path / "source" / "photo.png")
    decoded = []
    original = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda *a: decoded.append(a) or original(*a))

    def crops(*stages: str) -> list[np.ndarray]:
        recipe = Recipe.model_validate(
            {
                "name": "x",
                "base": {
                    "stage_1": str(random_cascade.stage_1),
                    "stage_2": str(random_cascade.stage_2),
                },
                "data": {"source": str(tmp_path / "source"), "prompt": "x"},
                "cache_dir": str(tmp_path / "cache" / "-".join(stages)),
                **{stage: {"steps": 1} for stage in stages},
            }
        )
        (picture,) = load_pictures(recipe.data, recipe.cache, *recipe.crops_px)
        sides = {"stage_1": 16, "stage_2": 64}
        rng = np.random.default_rng(0)
        return [
            np.asarray(crop(picture, sides[stage], rng, center_shift=0.0, horizontal_flip=False))
            for stage in stages
        ]

    both = crops("stage_1", "stage_2")
    assert len(decoded) == 1
    for pixels, stage in zip(both, ("stage_1", "stage_2"), strict=True):
        np.testing.assert_array_equal(pixels, *crops(stage))
    kept = [np.load(f, mmap_mode="r").shape for f in (tmp_path / "cache").glob("*-*/pictures/*")]
    assert sorted(kept) == [(66, 77, 3), (300, 350, 3)]  # 600 px by 9 and by 2


def test_only_huge_pictures_are_reduced(tmp_path: Path) -> None:
    side = 8 * SIZE_PX - 1
    assert decoded(encoded(photo(side, side)), tmp_path).shape == (side, side, 3)


def pillow(image: Image.Image, left: int, top: int) -> np.ndarray:
    side = min(image.size)
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC))


def test_the_centre_crop_is_pillows(tmp_path: Path) -> None:
    for image, left, top in ((photo(80, 120), 20, 0), (photo(36, 24), 0, 6), (photo(10, 10), 0, 0)):
        cropped = crop(
            picture_of(image, tmp_path),
            SIZE_PX,
            np.random.default_rng(0),
            center_shift=0.0,
            horizontal_flip=False,
        )
        np.testing.assert_array_equal(np.asarray(cropped), pillow(image, left, top))


@pytest.mark.parametrize(("width", "lefts"), [(60, range(15, 22)), (28, range(5)), (24, range(1))])
def test_the_centre_shifts_by_a_fraction_of_the_crop(
    width: int, lefts: range, tmp_path: Path
) -> None:
    image = photo(24, width)
    picture = picture_of(image, tmp_path)
    expected = {pillow(image, left, 0).tobytes() for left in lefts}
    seen = {
        crop(
            picture,
            SIZE_PX,
            np.random.default_rng(seed),
            center_shift=0.125,
            horizontal_flip=False,
        ).tobytes()
        for seed in range(60)
    }
    assert seen == expected


def test_a_picture_of_the_stage_size_stays_as_it_is(tmp_path: Path) -> None:
    image = photo(SIZE_PX, SIZE_PX)
    rng = np.random.default_rng(0)
    kept = crop(picture_of(image, tmp_path), SIZE_PX, rng, center_shift=0.1, horizontal_flip=False)
    assert kept.tobytes() == image.tobytes()


def test_the_flip_mirrors_about_half_of_the_pictures(tmp_path: Path) -> None:
    image = photo(SIZE_PX, SIZE_PX)
    picture = picture_of(image, tmp_path)

    def crops(horizontal_flip: bool) -> list[bytes]:
        return [
            crop(
                picture,
                SIZE_PX,
                np.random.default_rng(seed),
                center_shift=0.1,
                horizontal_flip=horizontal_flip,
            ).tobytes()
            for seed in range(40)
        ]

    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert set(crops(horizontal_flip=False)) == {image.tobytes()}
    flipped = crops(horizontal_flip=True)
    assert set(flipped) == {image.tobytes(), mirrored}
    assert 10 < flipped.count(mirrored) < 30


def test_a_tensor_spans_minus_one_to_one() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 2, 3)
    assert tensor[:, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])


def missing_source(folder: Path) -> tuple[Data, str]:
    return Data(source=str(folder / "nowhere" / "at" / "all"), prompt="x"), "nowhere/at/all"


def empty_folder(folder: Path) -> tuple[Data, str]:
    return Data(source=str(folder), prompt="x"), "has no pictures (found nothing)"


def truncated_picture(folder: Path) -> tuple[Data, str]:
    (folder / "half.png").write_bytes(encoded(photo())[:400])
    return Data(source=str(folder), prompt="x"), "half.png cannot be read"


def no_picture_at_all(folder: Path) -> tuple[Data, str]:
    (folder / "text.jpg").write_text("hello")
    return Data(source=str(folder), prompt="x"), "text.jpg cannot be read (it is damaged or"


def no_caption_column(folder: Path) -> tuple[Data, str]:
    data = with_metadata(folder)
    return data.model_copy(update={"caption_column": "words"}), "a field 'words' (found"


def no_image_column(folder: Path) -> tuple[Data, str]:
    data = as_parquet(folder)
    return data.model_copy(update={"image_column": "picture"}), "it has photo, label, likes"


def captions_that_are_no_text(folder: Path) -> tuple[Data, str]:
    data = as_parquet(folder)
    return data.model_copy(update={"caption_column": "likes"}), "must hold text"


def pictures_that_are_none(folder: Path) -> tuple[Data, str]:
    data = as_parquet(folder)
    return data.model_copy(update={"image_column": "likes"}), "must hold pictures"


def metadata_names_a_missing_file(folder: Path) -> tuple[Data, str]:
    data = with_metadata(folder)
    (folder / "1 [test].png").unlink()
    return data, "1 [test].png: there must be a file (found nothing)"


def metadata_without_file_names(folder: Path) -> tuple[Data, str]:
    data = with_metadata(folder)
    (folder / "metadata.jsonl").write_text('{"file": "0.png", "text": "x"}\n')
    return data, "a field 'file_name' (found"


def metadata_is_no_json(folder: Path) -> tuple[Data, str]:
    data = with_metadata(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": \n')
    return data, "there must be one JSON object"


def metadata_is_empty(folder: Path) -> tuple[Data, str]:
    data = with_metadata(folder)
    (folder / "metadata.jsonl").write_text("")
    return data, "lists no pictures"


def no_captions(folder: Path) -> tuple[Data, str]:
    save_photos(folder)
    return Data(source=str(folder)), "0 [test].png has no caption: write 0 [test].txt"


def empty_caption(folder: Path) -> tuple[Data, str]:
    data = with_text_files(folder)
    (folder / "2 [test].txt").write_text(" \n")
    return data, "2 [test].txt: the caption has no visible character (found SPACE, U+000A)"


def empty_caption_in_metadata(folder: Path) -> tuple[Data, str]:
    data = with_metadata(folder)
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().replace(CAPTIONS[2], " "))
    return data, "line 3: the caption has no visible character (found SPACE)"


def nul_in_metadata(folder: Path) -> tuple[Data, str]:
    data = with_metadata(folder)
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().replace(CAPTIONS[2], "a\\u0000b"))
    return data, "line 3: the caption has a NUL character"


def invisible_caption(folder: Path) -> tuple[Data, str]:
    data = with_text_files(folder)
    (folder / "2 [test].txt").write_text("\u200b\u2060")
    return data, "no visible character (found ZERO WIDTH SPACE, WORD JOINER)"


def invisible_caption_in_metadata(folder: Path) -> tuple[Data, str]:
    data = with_metadata(folder)
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().replace(CAPTIONS[2], "\ufeff"))
    return data, "line 3: the caption has no visible character (found ZERO"


def caption_in(encoding: str, found: str) -> Callable[[Path], tuple[Data, str]]:
    def make(folder: Path) -> tuple[Data, str]:
        data = with_text_files(folder)
        (folder / "2 [test].txt").write_bytes("a dog\nin a café".encode(encoding))
        return data, f"2 [test].txt must be text in UTF-8 (found {found}"

    return make


def metadata_in(
    encoding: str, name: str, found: str, word: str = "café"
) -> Callable[[Path], tuple[Data, str]]:
    def make(folder: Path) -> tuple[Data, str]:
        file = save_photos(folder, 1)[0].name
        lines = {
            "metadata.jsonl": f'\n{{"file_name": "{file}", "text": "{word}"}}',
            "metadata.csv": f"file_name,text\n{file},{word}",
        }
        (folder / name).write_bytes(lines[name].encode(encoding))
        return Data(source=str(folder)), f"{name} must be text in UTF-8 (found {found}"

    return make


def unknown_split(folder: Path) -> tuple[Data, str]:
    return with_metadata(folder).model_copy(update={"split": "test"}), "has no split 'test'"


def unknown_saved_split(folder: Path) -> tuple[Data, str]:
    return as_saved_splits(folder).model_copy(update={"split": "test"}), "its splits are good"


MISTAKES = (
    missing_source,
    empty_folder,
    truncated_picture,
    no_picture_at_all,
    no_caption_column,
    no_image_column,
    captions_that_are_no_text,
    pictures_that_are_none,
    metadata_names_a_missing_file,
    metadata_without_file_names,
    metadata_is_no_json,
    metadata_is_empty,
    no_captions,
    empty_caption,
    empty_caption_in_metadata,
    invisible_caption,
    invisible_caption_in_metadata,
    nul_in_metadata,
    caption_in("cp1252", "byte 0xe9 in line 2"),
    caption_in("utf-16", "UTF-16"),
    caption_in("utf-16-be", "UTF-16"),
    metadata_in("cp1252", "metadata.jsonl", "byte 0xe9 in line 2"),
    metadata_in("cp1252", "metadata.csv", "byte 0xe9 in line 2"),
    metadata_in("utf-16", "metadata.jsonl", "UTF-16"),
    metadata_in("utf-16-le", "metadata.csv", "UTF-16", "cafe"),
    unknown_split,
    unknown_saved_split,
)


@pytest.mark.parametrize("make", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_it(
    make: Callable[[Path], tuple[Data, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    data, message = make(folder)
    with pytest.raises(UserError) as error:
        load_pictures(data, tmp_path / "cache", SIZE_PX)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("pictures/.*"))


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    data = with_text_files(tmp_path / "source")
    for file in (tmp_path / "source").glob("*.txt"):
        file.write_text(file.read_text(), encoding="utf-8-sig")
    assert load_captions(data, tmp_path / "cache") == list(CAPTIONS)


@pytest.mark.parametrize(
    "source", ["photos/my/dog", "./dog", "../dog", "/nowhere/dog", "~/no folder of this name"]
)
def test_a_misspelt_folder_is_not_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="there is no such folder"):
        load_pictures(Data(source=source, prompt="x"), tmp_path, SIZE_PX)


@pytest.mark.parametrize("source", ["dog", "me/dog", "hf://datasets/me/dog", "buckets/me/my/dog"])
def test_names_on_the_hub_are_asked_for_with_configuration_and_revision(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    table = datasets.Dataset.from_dict({"text": CAPTIONS})

    def load_dataset(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked.append((arguments, options))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = Data(source=source, config="large", revision="v2", split="test")
    assert load_captions(data, tmp_path) == list(CAPTIONS)
    assert asked == [((source, "large"), {"split": "test", "revision": "v2"})]


@pytest.mark.parametrize("name", ["cats", "dogs"])
def test_a_configuration_of_the_dataset_is_chosen(name: str, tmp_path: Path) -> None:
    for config in ("cats", "dogs"):
        table = datasets.Dataset.from_dict({"text": [f"one of the {config}"]})
        table.to_parquet(tmp_path / "source" / f"{config}.parquet")
    card = {"configs": [{"config_name": c, "data_files": f"{c}.parquet"} for c in ("cats", "dogs")]}
    (tmp_path / "source" / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    data = Data(source=str(tmp_path / "source"), config=name)
    assert load_captions(data, tmp_path / "cache") == [f"one of the {name}"]


def test_a_part_of_a_split_is_a_split(tmp_path: Path) -> None:
    data = as_parquet(tmp_path / "source").model_copy(update={"split": "train[1:]"})
    assert load_captions(data, tmp_path / "cache") == list(CAPTIONS[1:])


def test_no_more_pictures_are_read_than_asked_for(tmp_path: Path) -> None:
    data = with_prompt(tmp_path / "source")
    everything = load_pictures(data, tmp_path / "cache", SIZE_PX)
    (tmp_path / "source" / "2 [test].png").write_bytes(b"damaged")
    assert load_pictures(data, tmp_path / "cache", SIZE_PX, limit=2) == everything[:2]


def test_a_hub_out_of_reach_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/nothing', split 'train', cannot be loaded"):
        load_pictures(Data(source="nobody/nothing", prompt="x"), tmp_path, SIZE_PX)
