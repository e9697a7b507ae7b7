"""Runs at once, and the GPU's free memory; planned here, on a machine without one."""

from pathlib import Path

import pytest
import torch

from adapters.errors import UserError
from finetune.memory.fit import plan
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Recipe
from finetune.sweeping import room
from tests.builders import ROOT
from unets.tally import DRIVER_BYTES

GPU = torch.device("cuda")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(ROOT)
    own = ("prior=null", "validation.prompts=[]", "validation.other_prompts=[]", "stage_2=null")
    best = ("validation.best=null", "text.device=cpu", "base.stage_2=null")
    return load_recipe(Path("recipes/quickstart.yaml"), [*own, *best])


def test_as_many_runs_fit_as_their_peaks_leave_room_for(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    bigger = recipe.model_copy(update={"name": "bigger"})
    assert bigger.stage_1 is not None
    fields = {"stage_1": bigger.stage_1.model_copy(update={"batch_size": 64})}
    bigger = bigger.model_copy(update=fields)
    largest = room.find_largest([recipe, bigger], GPU)
    assert largest == plan(room.as_scored(bigger), GPU).peak
    monkeypatch.setattr(room, "find_largest", lambda recipes, device: largest)
    need = largest.bytes + DRIVER_BYTES
    for free, fit in ((3.5 * need, 3), (2.0 * need, 2)):
        monkeypatch.setattr(room, "measure_free_bytes", lambda device, free=free: free)
        said = room.check_room([recipe, bigger], 2, GPU)
        assert said.startswith(f"At once, {fit} runs would fit: each run takes up to ")
        assert "(stage_1, training)" in said
    for free, fit in ((1.9 * need, 1), (0.9 * need, 0)):
        monkeypatch.setattr(room, "measure_free_bytes", lambda device, free=free: free)
        with pytest.raises(UserError, match=f"at_once is 2, but {fit} would fit: each run"):
            room.check_room([recipe, bigger], 2, GPU)


def test_the_pictures_that_are_scored_count(recipe: Recipe) -> None:
    """A sweep draws them in the same process, even if validation draws none."""
    without, scored = plan(recipe, GPU), plan(room.as_scored(recipe), GPU)
    assert not any("validation" in phase.name for phase in without.phases)
    assert any("validation" in phase.name for phase in scored.phases)


def test_runs_that_take_the_same_memory_are_planned_once(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe.stage_1 is not None
    optimizer = recipe.stage_1.optimizer.model_copy(update={"learning_rate": 0.1})
    faster = recipe.stage_1.model_copy(update={"optimizer": optimizer, "steps": 7})
    changes = ({}, {"seed": 3, "name": "other"}, {"stage_1": faster}, {"stage_1": None})
    planned: list[Recipe] = []

    def record(recipe: Recipe, device: torch.device) -> object:
        planned.append(recipe)
        return plan(recipes[0], device)

    recipes = [recipe.model_copy(update=change) for change in changes]
    monkeypatch.setattr(room, "plan", record)
    room.find_largest(recipes, GPU)
    assert len(planned) == 2
