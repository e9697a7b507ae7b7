"""Class pictures: what the base cascade draws, drawn once, and never a rejected one."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker
from PIL import Image

from adapters import Parts, load_cascade, read_picture_info
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError
from finetune.data import prior
from finetune.data.batches import CLASS, derived_seed
from finetune.data.captions import collect_captions
from finetune.data.pictures import Picture, crop
from finetune.data.prior import ClassPictures
from finetune.recipe.schema import Recipe
from tests.builders.random_cascade import RandomCascade
from tests.builders.recipes import CPU, embed

PROMPTS = ("a cat", " a Dog")
SAMPLING = {"stage_1": {"steps": 2}, "stage_2": {"steps": 2}}
PRIOR = {"prompts": PROMPTS, "count": 3, "sampling": SAMPLING}

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(random_cascade: RandomCascade, tmp_path: Path) -> MakeRecipe:
    """Makes a recipe with prior preservation and a cache of its own."""

    def make(cascade: RandomCascade = random_cascade, **sections: Any) -> Recipe:
        tree: dict[str, Any] = {
            "name": "test",
            "seed": 5,
            "base": {"stage_1": str(cascade.stage_1), "stage_2": str(cascade.stage_2)},
            "data": {"source": "unread", "prompt": "a sks cat"},
            "prior": PRIOR,
            "stage_1": {"steps": 1},
            "cache_dir": str(tmp_path / "cache"),
        }
        return Recipe.model_validate(tree | sections)

    return make


def made(recipe: Recipe) -> list[Picture]:
    embeds = embed(collect_captions(recipe, ()), recipe)
    return ClassPictures.of(recipe, embeds, CPU).load()


def pixels(pictures: list[Picture]) -> list[np.ndarray]:
    return [np.array(picture.pixels) for picture in pictures]


def folders(recipe: Recipe) -> list[str]:
    """The suffixes of the folders of class pictures."""
    places = (recipe.cache / "class_pictures").iterdir()
    return sorted(place.suffix for place in places if place.is_dir())


@pytest.mark.parametrize("stages", [("stage_1",), ("stage_1", "stage_2"), ("stage_2",)])
def test_class_pictures_are_the_base_cascades(
    stages: tuple[str, ...], make_recipe: MakeRecipe, random_cascade: RandomCascade
) -> None:
    training = {"stage_1": None, "stage_2": None} | {name: {"steps": 1} for name in stages}
    recipe = make_recipe(**training)
    pictures = made(recipe)
    assert [picture.caption for picture in pictures] == ["a cat", " a Dog", "a cat"]
    embeds = embed([*PROMPTS, ""], recipe)
    models = (random_cascade.stage_1, random_cascade.stage_2)[: 1 + ("stage_2" in stages)]
    cascade = load_cascade(*map(str, models), device="cpu", parts=Parts(text_encoder=False))
    expected = cascade(
        [picture.caption for picture in pictures],
        embeds=embeds,
        seed=[derived_seed(recipe.seed, CLASS, index, 0) for index in range(3)],
        sampling=Sampling(**SAMPLING),
    )
    for picture, image in zip(pictures, expected.final, strict=True):
        np.testing.assert_array_equal(picture.pixels, np.asarray(image))
        kept = crop(
            picture, image.width, np.random.default_rng(0), center_shift=0.1, horizontal_flip=False
        )
        assert kept.tobytes() == image.tobytes()


@pytest.mark.parametrize("guarded", [False, True])
def test_a_stages_pixels_do_not_depend_on_the_other_stage(
    make_recipe: MakeRecipe,
    random_cascade: RandomCascade,
    guarded_cascade: RandomCascade,
    guarded: bool,
) -> None:
    cascade = guarded_cascade if guarded else random_cascade
    alone = made(make_recipe(cascade))
    both = made(make_recipe(cascade, stage_2={"steps": 1}))
    size_px = alone[0].pixels.shape[0]
    for one, other in zip(alone, both, strict=True):
        np.testing.assert_array_equal(one.pixels_for(size_px), other.pixels_for(size_px))
        assert other.pixels.shape[0] > size_px


def test_each_says_what_it_was_drawn_with(
    make_recipe: MakeRecipe, random_cascade: RandomCascade
) -> None:
    recipe = make_recipe()
    made(recipe)
    (folder,) = (place for place in (recipe.cache / "class_pictures").iterdir() if place.is_dir())
    info = read_picture_info(folder / "stage_1" / "00001.png")
    assert info.prompts == {1: " a Dog"}
    assert info.seed == derived_seed(recipe.seed, CLASS, 1, 0)
    assert info.models == {1: str(random_cascade.stage_1)}


def test_they_are_sampled_once(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(make_recipe())
    monkeypatch.setattr(prior, "load_cascade", lambda *_, **__: pytest.fail("sampled again"))
    other = make_recipe(name="other", stage_1={"steps": 9}, validation={"sampling": SAMPLING})
    assert made(other) == first


def test_damaged_ones_are_sampled_again(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    first = made(recipe)
    drawn = pixels(first)
    (folder,) = (place for place in (recipe.cache / "class_pictures").iterdir() if place.is_dir())
    files = [folder / "stage_1" / name for name in ("00000.png", "00001.png", "metadata.jsonl")]
    whole = [file.read_bytes() for file in files]
    flipped = bytearray(whole[0])
    flipped[len(flipped) // 2] ^= 1
    files[0].write_bytes(flipped)
    files[1].write_bytes(whole[1][:50])
    files[2].unlink()
    assert made(recipe) == first
    assert [file.read_bytes() for file in files] == whole
    for ours, theirs in zip(pixels(made(recipe)), drawn, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_runs_that_start_together_sample_once(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    embed(collect_captions(recipe, ()), recipe)
    loads = []

    def recording(*models: str, **options: Any) -> Any:
        loads.append(models)
        return load_cascade(*models, **options)

    monkeypatch.setattr(prior, "load_cascade", recording)
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(made, recipe) for _ in range(3)]
        first, *others = (run.result() for run in runs)
    assert all(other == first for other in others)
    assert len(loads) == 1
    assert folders(recipe) == [""]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"prior": PRIOR | {"count": 2}},
        {"prior": PRIOR | {"prompts": PROMPTS[::-1]}},
        {"prior": PRIOR | {"sampling": SAMPLING | {"stage_1": {"steps": 2, "guidance": 2.0}}}},
        {"stage_2": {"steps": 1}},
        {"text": {"clean_caption": False}},
    ],
)
def test_what_decides_on_them_is_in_their_key(
    change: dict[str, Any], make_recipe: MakeRecipe
) -> None:
    made(make_recipe())
    made(make_recipe(**change))
    assert folders(make_recipe()) == ["", ""]


def test_interrupted_sampling_goes_on_to_the_same_pictures(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as many at once in both: a picture's last bit may depend on how many are drawn with it
    two = PRIOR | {"sampling": SAMPLING | {"batch_size": 2}}
    whole = made(make_recipe(cache_dir=str(tmp_path / "other"), prior=two))
    sampled: list[int] = []

    def interrupted(*arguments: Any) -> dict[int, Image.Image]:
        if sampled:
            raise KeyboardInterrupt
        images = original(*arguments)
        sampled.extend(images)
        return images

    original = ClassPictures._sample
    recipe = make_recipe(prior=two)
    with monkeypatch.context() as patch:
        patch.setattr(ClassPictures, "_sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(recipe)
    assert sampled == [0, 1]
    assert folders(recipe) == [".partial"]

    def recording(*arguments: Any) -> dict[int, Image.Image]:
        images = original(*arguments)
        sampled.extend(images)
        return images

    monkeypatch.setattr(ClassPictures, "_sample", recording)
    np.testing.assert_array_equal(pixels(made(recipe)), pixels(whole))
    assert sampled == [0, 1, 2]
    assert folders(recipe) == [""]


def test_metadata_says_what_the_pictures_show(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    made(recipe)
    (metadata,) = (recipe.cache / "class_pictures").glob("*/stage_1/metadata.jsonl")
    rows = [json.loads(row) for row in metadata.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a cat", " a Dog", "a cat"]
    assert all((metadata.parent / row["file_name"]).is_file() for row in rows)


def reject(monkeypatch: pytest.MonkeyPatch, rejected: Callable[[int], bool]) -> None:
    """Let the safety checker reject the pictures that it sees, by their number."""
    seen = iter(range(1000))

    def forward(self: IFSafetyChecker, clip_input: Any, images: Any, **_: Any) -> Any:
        flags = [rejected(next(seen)) for _ in images]
        for index, flag in enumerate(flags):
            if flag:
                images[index] = np.zeros(images[index].shape)
        return images, flags, [False] * len(flags)

    monkeypatch.setattr(IFSafetyChecker, "forward", forward)


def test_a_rejected_picture_is_replaced(
    make_recipe: MakeRecipe, guarded_cascade: RandomCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    reject(monkeypatch, lambda number: False)
    accepted = pixels(made(make_recipe(guarded_cascade)))
    reject(monkeypatch, lambda number: number == 1)
    replaced = pixels(made(make_recipe(guarded_cascade, cache_dir=make_recipe().cache_dir + "2")))
    differences = np.abs(np.subtract(accepted, replaced, dtype=np.int16)).mean(axis=(1, 2, 3))
    assert (differences > 5).tolist() == [False, True, False]
    assert all((picture == 0).mean() < 0.5 for picture in replaced)


def test_a_prompt_that_is_always_rejected_is_named(
    make_recipe: MakeRecipe, guarded_cascade: RandomCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    reject(monkeypatch, lambda number: True)
    monkeypatch.setattr(prior, "ATTEMPTS", 2)
    recipe = make_recipe(guarded_cascade)
    with pytest.raises(UserError, match=r"rejected 2 pictures of 'a cat'"):
        made(recipe)
    assert not list(recipe.cache.rglob("*.png"))


def save_pictures(folder: Path, captions: tuple[str, ...] = ()) -> None:
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (20, 20), (index, 0, 0)).save(folder / f"{index}.png")
    for index, caption in enumerate(captions):
        (folder / f"{index}.txt").write_text(caption)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ((), ["a cat", " a Dog", "a cat"]),
        (("one", "two", "three", "four"), ["one", "two", "three"]),
    ],
)
def test_a_folder_takes_the_place_of_sampling(
    own: tuple[str, ...], expected: list[str], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    save_pictures(tmp_path / "class", own)
    prior_section = {"prompts": PROMPTS, "count": 3, "folder": str(tmp_path / "class")}
    recipe = make_recipe(prior=prior_section)
    pictures = made(recipe)
    assert [picture.caption for picture in pictures] == expected
    assert [int(picture.pixels[0, 0, 0]) for picture in pictures] == [0, 1, 2]
    assert set(expected) <= set(collect_captions(recipe, ()))


def test_a_folder_may_start_at_home_and_hold_more_than_is_read(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(tmp_path / "class", ("one", "two", "three", "four"))
    (tmp_path / "class" / "3.png").write_bytes(b"damaged")
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = make_recipe(prior=PRIOR | {"folder": "~/class"})
    assert [picture.caption for picture in made(recipe)] == ["one", "two", "three"]
    assert "four" not in collect_captions(recipe, ())


def test_a_missing_folder_is_said(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    nowhere = {"prompts": PROMPTS, "folder": str(tmp_path / "nowhere")}
    with pytest.raises(UserError, match=r"prior.folder .*nowhere. is neither a folder nor a zip"):
        made(make_recipe(prior=nowhere))
