"""A step that is not finite changes nothing, and finite ones are as if nothing watched them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from adapters.errors import UserError
from adapters.weights.kinds import AdapterSpec
from finetune.recipe.schema import Optimizer
from finetune.run.checkpoints import list_checkpoints, load_checkpoint
from finetune.run.folders import Folders
from finetune.run.stage_run import train_stage
from finetune.run.trainee import Trainee
from finetune.step.optimizers import OPTIMIZERS
from finetune.step.stages import STAGES
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import events_of, exported, logged, material_of, recipe_of
from tests.builders.trainees import batch_of, take_steps, trainee_of

ON_CPU = [name for name in OPTIMIZERS if not name.startswith("paged")]


def trainee_with(cascade: RandomCascade, name: str, **options: object) -> Trainee:
    """A trainee with an average, and tensors both large and small enough for 32-bit moments."""
    rate = 1.0 if OPTIMIZERS[name].finds_scale else 1e-2
    optimizer = Optimizer(name=name, learning_rate=rate, **options)
    adapter = AdapterSpec(rank=16, targets="all")
    return trainee_of(cascade.stage_1, 1, optimizer=optimizer, adapter=adapter, ema_decay=0.5)


def all_of(trainee: Trainee) -> list[Tensor]:
    """Copies of all tensors that a step changes."""
    assert trainee.average is not None
    tensors = (trainee.weights.values, trainee.average, *trainee._moments())
    counters = {1}  # of steps, which count those skipped
    return [each.clone() for each in tensors if each.numel() not in counters]


def find_not_finite(tree: Any) -> str | None:
    """The place of a tensor in a tree that is not finite; ``None``: all are."""
    if isinstance(tree, Tensor):
        return None if tree.isfinite().all() else ""
    if not isinstance(tree, dict | list | tuple):
        return None
    for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if (place := find_not_finite(item)) is not None:
            return f"{key}.{place}"
    return None


def update_unwatched(trainee: Trainee) -> None:
    """Take an optimizer step that nothing guards."""
    gradient, limit = trainee.weights.gradient, trainee.training.optimizer.max_grad_norm
    if limit is not None:
        gradient.mul_((limit / gradient.norm()).clamp(max=1))
    trainee.optimizer.step()
    gradient.zero_()
    trainee.weights.publish()
    assert trainee.average is not None
    decay = min(0.5, (1 + trainee.step) / (10 + trainee.step))
    trainee.average.lerp_(trainee.weights.values, 1 - decay)
    trainee.step += 1


@pytest.mark.parametrize("name", ON_CPU)
def test_finite_steps_are_the_same_to_the_bit(random_cascade: RandomCascade, name: str) -> None:
    watched, unwatched = (trainee_with(random_cascade, name, max_grad_norm=0.1) for _ in range(2))
    for step in range(3):
        batch = batch_of(watched, step)
        for trainee in (watched, unwatched):
            trainee.accumulate(batch)
        watched.update()
        update_unwatched(unwatched)
    for ours, theirs in zip(all_of(watched), all_of(unwatched), strict=True):
        assert torch.equal(ours, theirs)
    assert watched.skipped.tolist() == [0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
@pytest.mark.parametrize("name", ON_CPU)
def test_a_step_that_is_not_finite_changes_nothing(
    random_cascade: RandomCascade, name: str, value: float
) -> None:
    """Neither do gradients whose squares are not, as second moments are."""
    trainee = trainee_with(random_cascade, name)
    take_steps(trainee, 2)
    before = all_of(trainee)
    for _ in range(2):
        trainee.accumulate(batch_of(trainee))
        trainee.weights.gradient[3] = value
        trainee.update()
        for ours, theirs in zip(all_of(trainee), before, strict=True):
            assert torch.equal(ours, theirs)
    assert trainee.skipped.tolist() == [2, 2]
    take_steps(trainee, 1)
    assert trainee.skipped.tolist() == [2, 0]
    assert find_not_finite(trainee.state()) is None
    assert not torch.equal(trainee.weights.values, before[0])


@pytest.mark.parametrize("name", ON_CPU)
def test_the_first_step_may_be_the_one(random_cascade: RandomCascade, name: str) -> None:
    trainee = trainee_with(random_cascade, name)
    fresh = trainee.weights.values.clone()
    trainee.accumulate(batch_of(trainee))
    trainee.weights.gradient.fill_(math.nan)
    trainee.update()
    assert torch.equal(trainee.weights.values, fresh)
    assert find_not_finite(trainee.state()) is None
    take_steps(trainee, 2)
    assert find_not_finite(trainee.state()) is None


def test_weights_that_overflow_are_taken_back(random_cascade: RandomCascade) -> None:
    signs = Optimizer(name="adamw", betas=(0, 0), weight_decay=0)
    signs = signs.model_copy(update={"learning_rate": 3e38})  # more than a recipe may say
    trainee = trainee_of(random_cascade.stage_1, 1, optimizer=signs)
    trainee.weights.gradient.fill_(1.0)
    trainee.update()
    before = trainee.weights.values.clone()
    assert before.isfinite().all()
    trainee.weights.gradient.fill_(1.0)
    norm = trainee.update()
    assert norm.isfinite()
    assert torch.equal(trainee.weights.values, before)
    assert trainee.skipped.tolist() == [1, 1]


def test_skipped_steps_are_counted_over_checkpoints(random_cascade: RandomCascade) -> None:
    trainee, other = (trainee_with(random_cascade, "adamw") for _ in range(2))
    trainee.weights.gradient.fill_(math.nan)
    trainee.update()
    other.load_state(trainee.state())
    assert other.skipped.tolist() == [1, 1]


def test_a_run_skips_the_steps_of_a_damaged_encoding_and_says_so(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"source": "unread", "prompt": "a sks dog", "caption_dropout": 0.3}
    stage = {"steps": 8, "batch_size": 1}
    recipe = recipe_of(random_cascade, tmp_path, stage=stage, data=data, log_every=4)
    material = material_of(recipe)
    empty = torch.full_like(material.prompt_embeds[""], math.nan)
    embeds = dict(material.prompt_embeds) | {"": empty}
    train_stage(recipe, STAGES[1], replace(material, prompt_embeds=embeds), Accelerator(cpu=True))
    skipped = logged(recipe, "optimizer/skipped_steps")
    assert 0 < skipped[-1] < 8
    assert "changed nothing, as their gradients or the weights" in capsys.readouterr().out
    assert all(map(math.isfinite, logged(recipe, "loss")))
    assert all(tensor.isfinite().all() for tensor in exported(recipe).values())
    for saved in list_checkpoints(Folders(recipe.folder).checkpoints(STAGES[1])):
        assert find_not_finite(load_checkpoint(saved)) is None


def test_a_run_without_finite_steps_ends(random_cascade: RandomCascade, tmp_path: Path) -> None:
    recipe = recipe_of(random_cascade, tmp_path, stage={"steps": 20}, log_every=2)
    material = material_of(recipe)
    nan = {prompt: each * math.nan for prompt, each in material.prompt_embeds.items()}
    with pytest.raises(UserError, match=r"none of the last 10 steps up to step 10 of stage_1 had"):
        train_stage(recipe, STAGES[1], replace(material, prompt_embeds=nan), Accelerator(cpu=True))
    newest = list_checkpoints(Folders(recipe.folder).checkpoints(STAGES[1]))[-1]
    assert find_not_finite(load_checkpoint(newest)) is None
    assert "loss" not in events_of(recipe).Tags()["scalars"]
