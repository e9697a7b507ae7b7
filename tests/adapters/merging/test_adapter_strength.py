"""How strong each kind of adapter is: its formula in float64, in training, export and merging."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from adapters import Parts, load_cascade
from adapters.weights.kinds import KINDS, adapted_modules, adapter_state
from finetune.run.folders import Folders
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import recipe_of, train, trainee_of

RANK = 4
MAGNITUDE = ("vector.weight", "vector")  # as a module's parameter, and in a file
Tensors = Mapping[str, Tensor]


def low_rank(t: Tensors) -> Tensor:
    return t["lora_B.weight"].flatten(1) @ t["lora_A.weight"].flatten(1)


def hadamard(t: Tensors) -> Tensor:
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def kronecker(t: Tensors) -> Tensor:
    large = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return torch.kron(t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"], large)


PRODUCTS: Mapping[str, tuple[Callable[[Tensors], Tensor], float]] = {
    "lora": (low_rank, 1.0),
    "rslora": (low_rank, 0.5),
    "dora": (low_rank, 1.0),
    "loha": (hadamard, 1.0),
    "lokr": (kronecker, 1.0),
}
"""What each kind multiplies, and the power of the rank by which alpha is divided."""


def merged(kind: str, alpha: float | None, weight: Tensor, tensors: Tensors) -> Tensor:
    """What an adapter makes of a weight [out, in], from its papers' formulas in float64."""
    product, power = PRODUCTS[kind]
    matrix = weight.double().flatten(1)
    own = {name: tensor.double() for name, tensor in tensors.items()}
    changed = matrix + (alpha or RANK) / RANK**power * product(own)
    if kind == "dora":
        changed *= own["lora_magnitude_vector"].flatten()[:, None] / changed.norm(
            dim=1, keepdim=True
        )
    return changed


def of_module(state: Tensors, name: str) -> Tensors:
    """A module's own tensors, by what PEFT calls them in a file."""
    start = f"{name}."
    return {
        key.removeprefix(start).replace(".default", "").replace(*MAGNITUDE): tensor
        for key, tensor in state.items()
        if key.startswith(start)
    }


def randomise(unet: UNet2DConditionModel, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(unet).values():
        tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.1)


@pytest.mark.parametrize("alpha", [None, 1.0, 12.0])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_alpha_is_the_strength_of_what_trains(
    random_cascade: RandomCascade, tmp_path: Path, kind: str, alpha: float | None
) -> None:
    adapter = {"kind": kind, "rank": RANK, "alpha": alpha, "targets": ["to_q", "add_v_proj"]}
    unet = trainee_of(recipe_of(random_cascade, tmp_path, stage={"adapter": adapter})).unet
    randomise(unet)
    state = adapter_state(unet)
    names = adapted_modules(unet)
    assert {name.rpartition(".")[2] for name in names} == {"to_q", "add_v_proj"}
    for name in names:
        layer = unet.get_submodule(name)
        assert isinstance(layer, BaseTunerLayer)
        base = layer.get_base_layer()
        expected = merged(kind, alpha, base.weight, of_module(state, name))
        x = torch.randn(5, base.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ours = layer(x).double() - layer(torch.zeros_like(x)).double()  # without the bias
        torch.testing.assert_close(ours, x.double() @ expected.T, rtol=1e-4, atol=1e-4)
        assert (expected - base.weight.double()).norm() > 0.005 * expected.norm()


@pytest.mark.parametrize("kind", PRODUCTS)
def test_what_a_run_exports_is_merged_at_its_alpha(
    random_cascade: RandomCascade, tmp_path: Path, kind: str
) -> None:
    alpha = 12.0
    adapter = {"kind": kind, "rank": RANK, "alpha": alpha, "targets": ["to_q", "add_v_proj"]}
    recipe = recipe_of(
        random_cascade,
        tmp_path,
        stage={"adapter": adapter, "steps": 2},
        optimizer={"learning_rate": 0.03},
    )
    state = train(recipe)
    plain = UNet2DConditionModel.from_pretrained(random_cascade.stage_1, subfolder="unet")
    cascade = load_cascade(
        random_cascade.stage_1,
        adapters=[Folders(recipe.folder).adapters],
        parts=Parts(text_encoder=False),
    )
    unet = cascade.stages[1].unet
    names = {key.partition(".to_q")[0] + ".to_q" for key in state if ".to_q" in key}
    assert names
    for name in names:
        weight = plain.get_submodule(name).weight
        expected = merged(kind, alpha, weight, of_module(state, name))
        ours = unet.get_submodule(name).weight.double()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        assert (expected - weight.double()).norm() > 1e-3 * expected.norm()


@pytest.fixture(scope="module")
def doras(
    random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[float, Path, Tensors]]:
    """Three trained DoRAs of the same modules: the scale, folder and tensors of each."""
    trained, folder = {}, tmp_path_factory.mktemp("doras")
    for seed, (name, scale) in enumerate({"one": 0.7, "two": -0.4, "three": 0.5}.items()):
        adapter = {"kind": "dora", "rank": RANK, "targets": ["to_q", "conv1"]}
        recipe = recipe_of(
            random_cascade,
            folder,
            name=name,
            seed=seed,
            stage={"adapter": adapter, "steps": 2},
            optimizer={"learning_rate": 0.1},
        )
        state = train(recipe)
        trained[name] = scale, Folders(recipe.folder).adapters, state
    return trained


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_several_doras_of_a_module_add_what_each_makes_of_it(
    random_cascade: RandomCascade,
    doras: dict[str, tuple[float, Path, Tensors]],
    precision: str,
) -> None:
    cascade = load_cascade(
        random_cascade.stage_1, dtype=precision, device="cpu", parts=Parts(text_encoder=False)
    )
    unet = cascade.stages[1].unet
    names = [n for n, _ in unet.named_modules() if n.endswith((".to_q", ".conv1"))]
    before = {name: unet.get_submodule(name).weight.detach().double() for name in names}
    for name, (scale, folder, _) in doras.items():
        cascade.add_adapter(folder, scale, name)
    rounding = 1e-6 if precision == "fp32" else 5e-3
    for module, weight in before.items():
        own = weight.flatten(1)
        expected = own + sum(
            scale * (merged("dora", None, weight, of_module(state, module)) - own)
            for scale, _, state in doras.values()
        )
        ours = unet.get_submodule(module).weight.detach().double().flatten(1)
        assert (ours - expected).norm() < rounding * expected.norm()
        assert (expected - own).norm() > 0.1 * own.norm()


def attention_projections(unet: nn.Module) -> set[str]:
    """Every linear layer within diffusers' attention, by its full name."""
    return {
        f"{block}.{name}"
        for block, attention in unet.named_modules()
        if isinstance(attention, Attention)
        for name, layer in attention.named_modules()
        if isinstance(layer, nn.Linear)
    }


@pytest.mark.parametrize("number", [1, 2])
def test_all_of_attention_trains_by_default_its_text_projections_too(
    random_cascade: RandomCascade, tmp_path: Path, number: int
) -> None:
    base = {1: random_cascade.stage_1, 2: random_cascade.stage_2}[number]
    everything = attention_projections(UNet2DConditionModel.from_pretrained(base, subfolder="unet"))
    assert {name for name in everything if "add_" in name}
    recipe = recipe_of(random_cascade, tmp_path, stages=(number,), stage={"steps": 1})
    assert set(adapted_modules(trainee_of(recipe, number).unet)) == everything
    learnt = {
        name.removesuffix(".lora_B.weight")
        for name, tensor in train(recipe, number).items()
        if name.endswith(".lora_B.weight") and tensor.abs().max() > 0
    }
    assert learnt == everything


@pytest.mark.parametrize("kind", KINDS)
def test_the_rank_is_the_recipes(random_cascade: RandomCascade, tmp_path: Path, kind: str) -> None:
    sizes = []
    for rank in (1, 2):
        adapter = {"kind": kind, "rank": rank, "targets": ["to_q"]}
        unet = trainee_of(recipe_of(random_cascade, tmp_path, stage={"adapter": adapter})).unet
        sizes.append(sum(t.numel() for n, t in adapter_state(unet).items() if "magn" not in n))
    assert sizes[0] * 2 == sizes[1] or kind in ("lokr", "oft")
    assert (sizes[0] > sizes[1]) == (kind == "oft")  # its rank is the number of blocks
