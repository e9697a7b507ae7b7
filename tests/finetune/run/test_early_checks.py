"""Mistakes that are found before anything is loaded."""

import pytest
import torch

from adapters.errors import UserError
from finetune.recipe.file import load_recipe
from finetune.run.early_checks import check_bf16

GPU = torch.device("cuda")


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for a T4, which is not here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ((), "stage_1.precision, stage_2.precision, text.precision"),
        (
            ("stage_1.precision=nf4", "stage_2.precision=fp32", "text.device=cpu"),
            "stage_1.precision",
        ),
    ],
)
def test_a_gpu_without_bf16_is_told_which_precision_to_take(
    overrides: tuple[str, ...], named: str
) -> None:
    recipe = load_recipe("recipes/quickstart.yaml", list(overrides))
    with pytest.raises(UserError, match=f"Tesla T4, has no bf16, in which {named} would") as error:
        check_bf16(recipe, GPU)
    assert "set each to fp32" in str(error.value)


@pytest.mark.usefixtures("old_gpu")
def test_in_fp32_it_trains() -> None:
    precisions = [f"{section}.precision=fp32" for section in ("stage_1", "stage_2", "text")]
    check_bf16(load_recipe("recipes/quickstart.yaml", precisions), GPU)


def test_a_cpu_needs_none() -> None:
    check_bf16(load_recipe("recipes/quickstart.yaml"), torch.device("cpu"))
