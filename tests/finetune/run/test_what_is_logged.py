"""TensorBoard's curves say what trained: losses as weighted, norms before clipping."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import logged, made_batches, recipe_of, train, trainee_of

PRIOR: Mapping[str, object] = {"prompts": ["a dog"], "share": 0.5, "weight": 3.0}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_curves_are_means_over_batches_of_the_weighted_losses(
    random_cascade: RandomCascade, tmp_path: Path, accumulation: int
) -> None:
    """Over steps between which the weights stay the same but for rounding."""
    recipe = recipe_of(
        random_cascade,
        tmp_path,
        stage={"steps": 2, "accumulation": accumulation},
        optimizer={"learning_rate": 1e-20, "max_grad_norm": 1e-3},
        prior=PRIOR,
        log_every=2,
    )
    train(recipe)
    made, norms, rows = made_batches(recipe), [], []
    for step in range(2):
        trainee = trainee_of(recipe)
        for index in range(step * accumulation, (step + 1) * accumulation):
            batch = made(index)
            losses = trainee.accumulate(batch)
            parts = (losses.total, losses.mse, losses.bound)
            rows.append([float((part * batch.weight).sum()) for part in parts])
        norms.append(trainee.weights.gradient.norm().item())
    expected = torch.tensor(rows).mean(0).tolist()
    for tag, value in zip(("loss", "loss/mse", "loss/bound_bits"), expected, strict=True):
        assert logged(recipe, tag) == pytest.approx([value], rel=1e-4)
    assert logged(recipe, "optimizer/gradient_norm") == pytest.approx([sum(norms) / 2], rel=1e-3)
    assert norms[0] > 1e-3


def test_losses_by_noise_are_those_of_their_quarter(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    recipe = recipe_of(
        random_cascade,
        tmp_path,
        stage={"steps": 2, "batch_size": 6},
        optimizer={"learning_rate": 1e-20},
        log_every=2,
    )
    train(recipe)
    made, trainee = made_batches(recipe), trainee_of(recipe)
    by_quarter: dict[int, list[float]] = {}
    for batch in map(made, range(2)):
        for t, loss in zip(batch.timesteps, trainee.accumulate(batch).total, strict=True):
            by_quarter.setdefault(int(t) // 250 + 1, []).append(float(loss))
    assert len(by_quarter) > 1
    for quarter, values in by_quarter.items():
        tag = f"loss_by_noise/quarter_{quarter}"
        assert logged(recipe, tag) == pytest.approx([sum(values) / len(values)], rel=1e-4)
