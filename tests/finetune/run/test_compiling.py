"""Compiling the UNet: only if asked for, only for a GPU, and with the same losses."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from adapters.errors import UserError
from finetune.run.early_checks import check_recipe
from finetune.run.trainee import Trainee
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import recipe_of, train
from tests.builders.trainees import take_steps, trainee_of


def test_a_run_compiles_the_unet_only_if_asked_to(
    random_cascade: RandomCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Trainee] = []
    monkeypatch.setattr(Trainee, "compile", lambda trainee: compiled.append(trainee))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "as it was")
    for asked in (False, True):
        train(recipe_of(random_cascade, tmp_path / str(asked), stage={"compile": asked}))
        assert len(compiled) == asked


def test_a_cpu_compiles_nothing(
    random_cascade: RandomCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    recipe = recipe_of(random_cascade, tmp_path, stage={"compile": True})
    with pytest.raises(UserError, match=r"stage_1\.compile: true needs a GPU"):
        check_recipe(recipe, torch.device("cpu"))
    check_recipe(recipe, torch.device("cuda"))


def test_compile_is_true_or_false(random_cascade: RandomCascade, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"compile\n.* boolean"):
        recipe_of(random_cascade, tmp_path, stage={"compile": "auto"})


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
