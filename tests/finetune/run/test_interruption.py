"""Runs that end in the middle: killed, or out of patience."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Recipe
from finetune.run import ending
from finetune.run.checkpoints import list_checkpoints, load_checkpoint
from finetune.run.figures import CLIP_I
from finetune.run.folders import Folders
from finetune.run.measures import Score
from finetune.run.stage_run import train_stage
from finetune.run.stopping import StoppedError, heed_signals
from finetune.run.trainee import Trainee
from finetune.run.validation import DrawnRow
from finetune.step.stages import STAGES
from tests.builders.processes import Child
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import (
    events_of,
    exported,
    flat,
    material_of,
    recipe_of,
    train,
)

VALIDATION = {
    "prompts": ["a sks dog"],
    "other_prompts": ["a cat"],
    "every": 1,
    "through_stage_2": "never",
    "loss_pictures": 2,
    "held_out": 1,
    "sampling": {"stage_1": {"steps": 1}, "stage_2": {"steps": 1}},
    "best": {"keep_others": None},
}
EVALUATION = {"identifier": "sks dog", "subject": "dog", "prompts": ["a sks dog at sea"]}


def judge(drawn: Sequence[DrawnRow]) -> dict[str, list[float]]:
    """Judge pictures by their pixels, so that figures tell which pictures they are of.

    The value stands for four pictures, so that no change is chance.
    """
    pixels = np.stack([np.asarray(picture) for each in drawn for picture in each.pictures])
    return {CLIP_I: [float(np.float32(pixels.mean() / 255))] * 4}


def die_in_validation(recipe: Path, number: int) -> None:
    """Train, and be killed where a validation's pictures are drawn and shown, but not measured."""
    validations = 0

    def judge_or_die(drawn: Sequence[DrawnRow]) -> dict[str, list[float]]:
        nonlocal validations
        if validations == number:
            os.kill(os.getpid(), signal.SIGKILL)
        validations += 1
        return judge(drawn)

    train(load_recipe(recipe), score=judge_or_die)


def all_that_is_shown(recipe: Recipe) -> dict[str, object]:
    """The points, pictures and texts of each tag in TensorBoard but those of time and memory."""
    events = events_of(recipe)
    tags = events.Tags()
    shown: dict[str, object] = {}
    for tag in tags["scalars"]:
        if not tag.startswith("speed/"):
            shown[tag] = [(point.step, point.value) for point in events.Scalars(tag)]
    for tag in tags["images"]:
        images = events.Images(tag)
        shown[tag] = [(image.step, image.encoded_image_string) for image in images]
    for tag in tags["tensors"]:
        texts = events.Tensors(tag)
        shown[tag] = [(text.step, *text.tensor_proto.string_val) for text in texts]
        if tag == "recipe/text_summary":  # which has the run's own folders in it
            shown[tag] = len(texts)
    return shown


def left_by(recipe: Recipe) -> dict[str, Any]:
    """The validations in the newest checkpoint."""
    saved = list_checkpoints(Folders(recipe.folder).checkpoints(STAGES[1]))
    left: dict[str, Any] = load_checkpoint(saved[-1])["measures"]
    return left


def judged(cascade: RandomCascade, folder: Path) -> Recipe:
    settings = {"stage": {"steps": 3}, "validation": VALIDATION, "evaluation": EVALUATION}
    return recipe_of(cascade, folder, **settings)


@pytest.fixture(scope="module")
def straight(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run that nothing interrupted."""
    recipe = judged(random_cascade, tmp_path_factory.mktemp("straight"))
    train(recipe, score=judge)
    return recipe


@pytest.mark.parametrize("number", [0, 2])
def test_a_run_killed_in_a_validation_goes_on_as_if_it_had_not_been(
    random_cascade: RandomCascade, straight: Recipe, tmp_path: Path, number: int
) -> None:
    recipe = judged(random_cascade, tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    child = Child(tmp_path / "log", die_in_validation, file, number)
    assert child.wait() == -signal.SIGKILL
    assert len(list_checkpoints(Folders(recipe.folder).checkpoints(STAGES[1]))) == max(
        number - 1, 0
    )
    assert_goes_on(recipe, straight)


def ask_to_stop(recipe: Recipe, score: Score = judge) -> None:
    """Train until a signal comes, and see that it is heeded."""
    with pytest.raises(StoppedError), heed_signals(print) as stop:
        train_stage(recipe, STAGES[1], material_of(recipe), Accelerator(cpu=True), score, stop)


def assert_goes_on(recipe: Recipe, straight: Recipe) -> None:
    """Finish a run, and compare all that it leaves with one that nothing interrupted."""
    weights = train(recipe, score=judge)
    assert torch.equal(flat(weights), flat(exported(straight)))
    shown, expected = all_that_is_shown(recipe), all_that_is_shown(straight)
    assert shown.keys() == expected.keys()
    for tag, points in expected.items():
        assert shown[tag] == points, tag
    left, theirs = left_by(recipe), left_by(straight)
    assert left["history"] == theirs["history"]
    assert torch.equal(flat(left["best_weights"]), flat(theirs["best_weights"]))


@pytest.mark.parametrize("number", range(4))
def test_a_signal_in_a_validation_saves_the_step_and_the_validation_is_made_up(
    random_cascade: RandomCascade, straight: Recipe, tmp_path: Path, number: int
) -> None:
    recipe, validations = judged(random_cascade, tmp_path), 0

    def judge_and_ask(drawn: Sequence[DrawnRow]) -> dict[str, float]:
        nonlocal validations
        if validations == number:
            os.kill(os.getpid(), signal.SIGTERM)
        validations += 1
        return judge(drawn)

    ask_to_stop(recipe, judge_and_ask)
    saved = list_checkpoints(Folders(recipe.folder).checkpoints(STAGES[1]))
    assert [folder.name for folder in saved] == [f"step-{n + 1:06d}" for n in range(number)]
    if number:
        assert len(left_by(recipe)["history"]) == number
    assert_goes_on(recipe, straight)


def test_a_signal_in_a_step_waits_for_its_end_and_saves_it(
    random_cascade: RandomCascade,
    straight: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = judged(random_cascade, tmp_path).model_dump(mode="json")
    tree["stage_1"]["checkpoint_every"] = 100
    recipe = Recipe.model_validate(tree)
    update = Trainee.update

    def ask(trainee: Trainee) -> torch.Tensor:
        if trainee.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(trainee)

    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "update", ask)
        ask_to_stop(recipe)
    (saved,) = list_checkpoints(Folders(recipe.folder).checkpoints(STAGES[1]))
    assert saved.name == "step-000002"
    assert_goes_on(recipe, straight)


def test_a_signal_in_the_export_leaves_nothing_that_is_shown_twice(
    random_cascade: RandomCascade,
    straight: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = judged(random_cascade, tmp_path)
    write_card = ending.write_card

    def ask(*given: Any) -> None:
        write_card(*given)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ending, "write_card", ask)
        ask_to_stop(recipe)
    assert_goes_on(recipe, straight)
