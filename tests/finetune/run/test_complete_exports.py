"""Finished means complete: what an export has lost is exported again, with the same bytes."""

from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

import pytest

from adapters.errors import UserError
from finetune.recipe.schema import Recipe
from finetune.run.folders import Folders, list_unfinished
from finetune.step.stages import STAGES
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import recipe_of, train

DRAWN = {
    "prompts": ["a sks dog"],
    "every": 2,
    "loss_pictures": 0,
    "sampling": {"stage_1": {"steps": 1}, "stage_2": {"steps": 1}},
    "through_stage_2": "never",
}
ADAPTER = {"kind": "loha", "rank": 2}  # which diffusers gets an approximation of


def read(recipe: Recipe) -> dict[str, bytes]:
    """The content of all exported files, by their paths."""
    folder = Folders(recipe.folder).adapters
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def restore(recipe: Recipe, content: dict[str, bytes]) -> None:
    for name, each in content.items():
        (Folders(recipe.folder).adapters / name).write_bytes(each)


@pytest.fixture(scope="module")
def both(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of both stages, finished."""
    stage = {"steps": 2, "adapter": ADAPTER, "checkpoint_every": 2}
    folder = tmp_path_factory.mktemp("both")
    recipe = recipe_of(random_cascade, folder, stage=stage, validation=DRAWN, stages=(1, 2))
    for number in (1, 2):
        train(recipe, number)
    return recipe


def test_two_runs_export_the_same_bytes(random_cascade: RandomCascade, tmp_path: Path) -> None:
    exports = []
    for _ in range(2):
        stage = {"steps": 2, "adapter": ADAPTER}
        recipe = recipe_of(random_cascade, tmp_path, stage=stage, validation=DRAWN)
        train(recipe)
        exports.append(read(recipe))
        rmtree(recipe.folder)
    first, second = exports
    assert set(first) == {
        *(f"stage_1/{name}.safetensors" for name in ("adapter_model", "pytorch_lora_weights")),
        *("stage_1/adapter_config.json", "README.md", "samples/00.png", "SHA256SUMS"),
    }
    for name, content in first.items():
        assert second[name] == content, name


def remove(file: Path) -> None:
    file.unlink()


def cut_off(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 5])


def fill_with_zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [remove, cut_off, fill_with_zeros])
def test_a_damaged_export_is_not_finished(damage: Callable[[Path], None], both: Recipe) -> None:
    whole = read(both)
    assert list_unfinished(both) == []
    for name in whole:
        damage(Folders(both.folder).adapters / name)
        stage = STAGES[1] if name.startswith("stage_1") else STAGES[2]
        expected = list(STAGES.values()) if name == "SHA256SUMS" else [stage]
        assert list_unfinished(both) == expected, name
        restore(both, whole)
    assert list_unfinished(both) == []


def test_what_is_lost_is_exported_again_from_the_last_checkpoint(both: Recipe) -> None:
    whole, folder = read(both), Folders(both.folder).adapters
    cut_off(folder / "stage_1" / "adapter_model.safetensors")
    train(both, 1)  # and the pictures of Stage II stay in the card
    assert read(both) == whole
    fill_with_zeros(folder / "stage_1" / "pytorch_lora_weights.safetensors")
    remove(folder / "stage_2" / "adapter_config.json")
    cut_off(folder / "stage_2" / "adapter_model.safetensors")
    remove(folder / "README.md")
    remove(folder / "samples" / "00.png")
    assert list_unfinished(both) == list(STAGES.values())
    for number in (1, 2):
        train(both, number)
    assert read(both) == whole
    assert list_unfinished(both) == []


def test_a_card_that_was_edited_stays(both: Recipe) -> None:
    whole, card = read(both), Folders(both.folder).adapters / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    assert list_unfinished(both) == []
    restore(both, whole)


def test_an_export_without_checkpoints_to_mend_it_is_said(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    recipe = recipe_of(random_cascade, tmp_path, stage={"steps": 1})
    train(recipe)
    rmtree(Folders(recipe.folder).checkpoints(STAGES[1]))
    assert list_unfinished(recipe) == []
    cut_off(Folders(recipe.folder).adapters / "stage_1" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no whole checkpoint to export it again from"):
        list_unfinished(recipe)
