"""A base's pictures are drawn once, and read bit for bit by whatever evaluates it afterwards."""

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import read_picture_info
from adapters.cascade.results import Sample
from finetune.evaluate import main
from finetune.evaluation.base_pictures import RECORD, BasePictures, read_batch
from finetune.evaluation.drawing import BASE, Desk, Shot, draw_variants, list_shots
from finetune.recipe.schema import Recipe
from finetune.run.folders import Folders
from tests.builders import ROOT
from tests.builders.processes import Child
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import recipe_of

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "identifier": "sks dog",
    "subject": "dog",
    "prompts": ["a sks dog", "a sks dog on blue"],
    "other_prompts": ["a cat"],
    "clip": "unread",
    "sampling": {"stage_1": {"steps": 1}, "stage_2": {"steps": 1}, "batch_size": 2},
}


def evaluated(cascade: RandomCascade, folder: Path, **changes: Any) -> Recipe:
    return recipe_of(cascade, folder, evaluation=SETTINGS | changes)


def draw(recipe: Recipe) -> tuple[Sample, ...]:
    assert recipe.evaluation is not None
    shots = list_shots(recipe.evaluation)
    return draw_variants(recipe, recipe.evaluation, shots, {}, CPU)[BASE]


@pytest.fixture(scope="module")
def recipe(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return evaluated(random_cascade, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def first(recipe: Recipe) -> tuple[Sample, ...]:
    """The pictures as they are drawn the first time."""
    return draw(recipe)


@pytest.fixture
def batch(recipe: Recipe, first: tuple[Sample, ...]) -> Path:
    """The folder of the first batch, of two pictures."""
    assert first
    files = recipe.cache.glob("base_pictures/*/*/001-stage_2.png")
    return next(f.parent for f in files if read_picture_info(f).prompt == "a sks dog on blue")


@pytest.fixture
def drawn(first: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that are drawn during a test, rather than read."""
    assert first
    prompts: list[str] = []
    plain = Desk._draw

    def spy(self: Desk, batch: Sequence[Shot]) -> tuple[Sample, ...]:
        prompts.extend(shot.prompt for shot in batch)
        return plain(self, batch)

    monkeypatch.setattr(Desk, "_draw", spy)
    return prompts


def check_equal(one: Sequence[Sample], other: Sequence[Sample]) -> None:
    for left, right in zip(one, other, strict=True):
        assert (left.prompt, left.seed, left.flagged) == (right.prompt, right.seed, right.flagged)
        assert left.info == right.info
        assert left.pictures.keys() == right.pictures.keys() == {1, 2}
        for stage, picture in left.pictures.items():
            assert np.array_equal(np.asarray(picture), np.asarray(right.pictures[stage]))


def test_what_is_read_is_what_was_drawn(
    recipe: Recipe, first: tuple[Sample, ...], drawn: list[str], tmp_path: Path
) -> None:
    again = draw(recipe)
    assert drawn == []
    check_equal(first, again)
    for number, samples in enumerate((first, again)):
        samples[0].save(tmp_path / f"{number}.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_an_interrupted_evaluation_leaves_the_bases_pictures_and_nothing_else(
    random_cascade: RandomCascade, tmp_path: Path, drawn: list[str]
) -> None:
    """As a user interrupts it, while it draws; the same command then draws the rest."""
    changes: dict[str, Any] = {"clip": str(ROOT / "models/if-tiny/clip"), "pictures_per_prompt": 10}
    data = {"source": str(ROOT / "datasets/octopus")}
    recipe = evaluated(random_cascade, tmp_path, **changes)
    recipe = Recipe.model_validate(recipe.model_dump() | {"data": data})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    arguments = [str(file), "--adapters"]
    child = Child(tmp_path / "log", main, arguments)
    while child.wait(0) is None and len(list(recipe.cache.rglob(RECORD))) < 2:
        time.sleep(0.01)
    child.send(signal.SIGINT)
    assert (child.wait(), child.output) == (130, "")
    assert child.errors.splitlines()[-1].endswith("interrupted")
    assert "Traceback" not in child.errors
    assert not recipe.folder.exists()
    kept = {each: each.stat().st_mtime_ns for each in recipe.cache.rglob(RECORD)}
    assert 2 <= len(kept) < 15
    main(arguments)
    assert len(drawn) == 30 - 2 * len(kept)
    assert kept == {each: each.stat().st_mtime_ns for each in kept}
    assert (Folders(recipe.folder).evaluation / "report.html").is_file()


def test_a_batch_alone_is_drawn_if_another_prompt_joins_it(
    random_cascade: RandomCascade, recipe: Recipe, drawn: list[str]
) -> None:
    folder = recipe.cache.parent
    draw(evaluated(random_cascade, folder, other_prompts=["a cat", "a pizza"]))
    assert drawn == ["a cat", "a pizza"]


def test_a_damaged_batch_alone_is_drawn_again(
    recipe: Recipe, first: tuple[Sample, ...], batch: Path, drawn: list[str]
) -> None:
    flip_a_bit(batch / "001-stage_2.png")
    check_equal(first, draw(recipe))
    assert drawn == ["a sks dog", "a sks dog on blue"]
    assert read_batch(batch, 2) is not None


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def empty(file: Path) -> None:
    file.write_text("{}")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("000-stage_1.png", truncate),
        ("001-stage_2.png", flip_a_bit),
        ("001-stage_2.png", Path.unlink),
        (RECORD, empty),
        (RECORD, truncate),
    ],
)
def test_damage_is_noticed(
    name: str, damage: Callable[[Path], None], batch: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "batch"
    shutil.copytree(batch, copied)
    assert read_batch(copied, 2) is not None
    assert read_batch(copied, 3) is None
    damage(copied / name)
    assert read_batch(copied, 2) is None


def test_all_that_decides_on_pixels_is_in_the_folders_name(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    def place(recipe: Recipe) -> Path:
        assert recipe.evaluation is not None
        assert recipe.evaluation.sampling is not None
        return BasePictures.of(recipe, recipe.evaluation.sampling, CPU).folder

    recipe = evaluated(random_cascade, tmp_path)
    other_steps = SETTINGS["sampling"] | {"stage_1": {"steps": 2}}
    others = [
        evaluated(random_cascade, tmp_path, sampling=other_steps),
        recipe_of(random_cascade, tmp_path, evaluation=SETTINGS, stage={"precision": "bf16"}),
        recipe_of(random_cascade, tmp_path, evaluation=SETTINGS, text={"clean_caption": False}),
    ]
    assert place(evaluated(random_cascade, tmp_path, identifier="dog")) == place(recipe)
    assert len({place(each) for each in [recipe, *others]}) == 1 + len(others)

    copied = tmp_path / "copy"
    shutil.copytree(random_cascade.stage_1, copied)
    base = {"stage_1": str(copied), "stage_2": str(random_cascade.stage_2)}
    moved = recipe_of(random_cascade, tmp_path, evaluation=SETTINGS, base=base)
    before = place(moved)
    (weights,) = copied.glob("unet/*.safetensors")
    tensors = load_file(weights)
    next(iter(tensors.values())).add_(1e-3)
    save_file(tensors, weights)
    assert place(moved) != before


def test_other_encodings_of_the_same_prompts_are_other_pictures(tmp_path: Path) -> None:
    shot = Shot("subject", 0, 0, "a sks dog", "a dog", "a dog", 7)
    embeds = {text: torch.zeros(2, 3) for text in ("", "a sks dog", "a dog")}
    kept = BasePictures(tmp_path)
    place = kept.place([shot], embeds)
    for text in embeds:
        changed = embeds | {text: torch.ones(2, 3)}
        assert kept.place([shot], changed) != place
    assert kept.place([shot, shot], embeds) != place
