"""Weights and gradients in float32 beside a UNet in any precision, and after a kill."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.weights.kinds import KINDS, adapter_parameters
from finetune.run.folders import Folders
from finetune.run.trainee import Trainee
from finetune.step.inputs import Batch, add_noise, unet_inputs
from finetune.step.stages import STAGES
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import (
    flat,
    logged,
    made_batches,
    recipe_of,
    saved_weights,
    train,
    trainee_of,
)


def accumulated(trainee: Trainee, *batches: Batch) -> Tensor:
    for batch in batches:
        trainee.accumulate(batch)
    return trainee.weights.gradient.clone()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_batches_add_up_and_go_with_the_update(
    random_cascade: RandomCascade, tmp_path: Path, kind: str, precision: str
) -> None:
    recipe = recipe_of(
        random_cascade,
        tmp_path,
        stage={"precision": precision, "adapter": {"kind": kind, "rank": 2}},
        optimizer={"learning_rate": 1e-30},  # all steps have the same weights
    )
    made = made_batches(recipe)
    first, second = made(0), made(1)
    one, other = (accumulated(trainee_of(recipe), batch) for batch in (first, second))
    trainee = trainee_of(recipe)
    torch.testing.assert_close(accumulated(trainee, first, second), one + other)
    trainee.update()
    torch.testing.assert_close(accumulated(trainee, first), one)
    trainee.update()
    torch.testing.assert_close(accumulated(trainee, second), other)
    assert (one - other).norm() > 0.1 * one.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_forward_pass_is_with_the_newest_weights(
    random_cascade: RandomCascade, tmp_path: Path, precision: str, kind: str
) -> None:
    """In float32, but for a LoRA beside bf16, whose products need no more."""
    recipe = recipe_of(
        random_cascade,
        tmp_path,
        stage={"precision": precision, "adapter": {"kind": kind, "rank": 2}},
        optimizer={"learning_rate": 0.03},
    )
    trainee, batch = trainee_of(recipe), made_batches(recipe)(0)
    base = trainee.accumulate(batch).total.clone()
    trainee.update()
    assert not torch.allclose(trainee.accumulate(batch).total, base, rtol=1e-4)
    exact = trainee.state()["parameters"]
    rounded = precision == "bf16" and kind in ("lora", "rslora")
    for name, parameter in adapter_parameters(trainee.unet).items():
        assert torch.equal(parameter.bfloat16(), exact[name].bfloat16()), name
        assert rounded or torch.equal(parameter, exact[name]), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "oft"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_training_starts_from_what_the_base_predicts(
    random_cascade: RandomCascade, tmp_path: Path, kind: str, precision: str
) -> None:
    """To the bit, in the precision that the adapter trains in (OFT: but for rounding)."""
    adapter = {"kind": kind, "rank": 2, "targets": "all"}
    settings = {"precision": precision, "adapter": adapter}
    trainee = trainee_of(recipe_of(random_cascade, tmp_path, stage=settings))
    batch = made_batches(recipe_of(random_cascade, tmp_path))(0)
    trainee.unet.disable_adapters()
    with torch.no_grad():
        inputs = unet_inputs(
            trainee.stage,
            batch,
            add_noise(batch, trainee.schedulers[0]),
            trainee.schedulers,
            trainee.unet.dtype,
        )
        base = trainee.unet(**inputs).sample
        trainee.unet.enable_adapters()
        ours = trainee.unet(**inputs).sample
    assert torch.equal(ours, base)


KILLED: Mapping[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16, DoRA": {"precision": "bf16", "adapter": {"kind": "dora", "rank": 2}},
    "accumulation": {"accumulation": 2},
    "dropout": {"adapter": {"rank": 2, "dropout": 0.5}},
    "average": {"ema_decay": 0.7},
    "schedule": {"optimizer": {"name": "adamw_8bit", "schedule": "cosine", "learning_rate": 0.01}},
}
"""Settings of a killed run's stage."""


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_takes_the_steps_that_were_left(
    random_cascade: RandomCascade, tmp_path: Path, name: str
) -> None:
    recipe = recipe_of(random_cascade, tmp_path, stage=KILLED[name])
    straight = flat(train(recipe))
    steps, losses = saved_weights(recipe), logged(recipe, "loss")
    folders = Folders(recipe.folder)
    for newer in (3, 4):
        shutil.rmtree(folders.checkpoints(STAGES[1]) / f"step-{newer:06d}")
    for written in (folders.adapters, folders.logs(STAGES[1])):
        shutil.rmtree(written)
    continued = flat(train(recipe))
    assert logged(recipe, "loss") == losses[2:]
    assert torch.equal(saved_weights(recipe), steps)
    assert torch.equal(continued, straight)
