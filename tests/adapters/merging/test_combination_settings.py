"""The settings of a combination take effect: the rank of an SVD, the density, the elected sign."""

from pathlib import Path

import pytest
import torch
from peft.utils.merge_utils import ties
from torch import Tensor

from adapters import Cascade, Parts, load_cascade
from finetune.run.folders import Folders
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import recipe_of, train

SCALES = {"one": 0.7, "two": 0.5}


@pytest.fixture(scope="module")
def cascade(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    """With two LoRAs of rank 4, each trained for two steps."""
    folder: Path = tmp_path_factory.mktemp("combined")
    loaded = load_cascade(random_cascade.stage_1, device="cpu", parts=Parts(text_encoder=False))
    for seed, name in enumerate(SCALES):
        recipe = recipe_of(
            random_cascade,
            folder,
            name=name,
            seed=seed,
            stage={"steps": 2, "adapter": {"rank": 4, "targets": ["to_q"]}},
            optimizer={"learning_rate": 0.1},
        )
        train(recipe)
        loaded.add_adapter(Folders(recipe.folder).adapters, 0.0, name)
    return loaded


def combine(cascade: Cascade, method: str, **settings: object) -> dict[str, Tensor]:
    """The tensors of a combination; its adapter is gone again."""
    name = cascade.combine(SCALES, method, name="new", **settings)
    state = cascade.merged[1].adapters[name].state
    cascade.remove_adapter(name)
    return state


def parts(cascade: Cascade, name: str) -> list[Tensor]:
    """A tensor of each adapter, in float64."""
    return [cascade.merged[1].adapters[each].state[name].double() for each in SCALES]


@pytest.mark.parametrize("rank", [1, 3, None])
def test_an_svd_is_cut_off_at_the_rank(cascade: Cascade, rank: int | None) -> None:
    state = combine(cascade, "svd", rank=rank)
    modules = {name.removesuffix(".lora_A.weight") for name in state if "lora_A" in name}
    for module in modules:
        b, a = (state[f"{module}.lora_{side}.weight"].double() for side in "BA")
        assert len(a) == (rank or 4)
        pairs = zip(*(parts(cascade, f"{module}.lora_{side}.weight") for side in "BA"), strict=True)
        scaled = zip(SCALES.values(), pairs, strict=True)
        u, s, v = torch.linalg.svd(sum(scale * b_i @ a_i for scale, (b_i, a_i) in scaled))
        nearest = (u[:, : rank or 4] * s[: rank or 4]) @ v[: rank or 4]
        assert (b @ a - nearest).norm() < 1e-4 * nearest.norm()


@pytest.mark.parametrize("density", [0.3, 0.9])
@pytest.mark.parametrize("sign", ["total", "frequency", None])
def test_the_sign_is_elected_and_values_pruned_as_asked(
    cascade: Cascade, sign: str | None, density: float
) -> None:
    state = combine(cascade, "ties", density=density, majority_sign=sign)
    shares = torch.tensor([scale**0.5 for scale in SCALES.values()], dtype=torch.float64)
    for name, ours in state.items():
        own = parts(cascade, name)
        expected = ties(own, shares, density, sign or "total")
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)
        other = {"total": "frequency", "frequency": "total"}[sign or "total"]
        assert not torch.allclose(ours.double(), ties(own, shares, density, other), atol=1e-4)
