"""Compiling: where it pays, where it is asked for, and with the same losses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import UserError
from finetune.recipe.schema import Recipe
from finetune.run.compiling import WATCHED_POINTS, Compiling
from tests.builders.random_cascade import RandomCascade
from tests.builders.trainees import take_steps, trainee_of


def compiling_of(cascade: RandomCascade, folder: Path, **training: Any) -> Compiling:
    recipe = Recipe.model_validate(
        {
            "name": "compiled",
            "base": {"stage_1": str(cascade.stage_1)},
            "data": {"source": "none", "prompt": "none"},
            "stage_1": {"steps": 1, "batch_size": 2} | training,
            "cache_dir": str(folder),
        }
    )
    trainee = trainee_of(cascade.stage_1, 1)
    trainee.training = recipe.training(trainee.stage)
    return Compiling.of(recipe, trainee, 1)


@pytest.mark.parametrize(("steps", "pays"), [(1_000, False), (10_000_000, True)])
def test_only_a_long_run_pays(
    random_cascade: RandomCascade, tmp_path: Path, steps: int, pays: bool
) -> None:
    compiling = compiling_of(random_cascade, tmp_path, steps=steps)
    compiling.undecided = True  # as on a GPU
    said = [compiling.consider(20.0) for _ in range(WATCHED_POINTS + 2)]
    (reason,) = filter(None, said)
    assert said.index(reason) == WATCHED_POINTS - 1
    assert reason.startswith("Compiling" if pays else "Not compiling")
    assert f"{steps:,} steps" in reason
    assert (compiling.trainee.predict is not compiling.trainee.unet) == pays


def test_a_cpu_compiles_nothing(random_cascade: RandomCascade, tmp_path: Path) -> None:
    for asked in (False, "auto"):
        compiling = compiling_of(random_cascade, tmp_path, steps=10_000_000, compile=asked)
        assert [compiling.consider(20.0) for _ in range(WATCHED_POINTS)] == [None] * WATCHED_POINTS
        assert compiling.trainee.predict is compiling.trainee.unet
    with pytest.raises(UserError, match=r"stage_1\.compile: true needs a GPU"):
        compiling_of(random_cascade, tmp_path, compile=True)


def test_compiled_steps_have_the_losses_of_plain_ones(
    random_cascade: RandomCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated by the compiler; generating code is left out, for time."""
    plain, traced = (trainee_of(random_cascade.stage_2, 2) for _ in range(2))
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compiler(*args, backend="aot_eager", **options)
    )
    traced.compile()
    assert take_steps(traced, 3) == pytest.approx(take_steps(plain, 3), rel=1e-4)
