"""Files of LyCORIS load as the library itself computes them, whatever the algorithm."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lycoris import LycorisNetwork
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import Cascade, Parts, load_cascade
from adapters.errors import UserError
from adapters.files.reading import alpha_of, kind_of, rank_of, read_adapter
from adapters.files.stage_adapter import StageAdapter
from tests.builders.random_cascade import RandomCascade

ALL = {"target_module": ["Linear", "Conv2d"], "target_name": [], "name_algo_map": {}}
TARGETS = {"target_module": [], "target_name": ["*.to_q", "*.conv1"], "use_fnmatch": True}
MIXED = {
    **TARGETS,
    "name_algo_map": {
        "*.to_q": {"algo": "lokr", "factor": 4},
        "*.conv1": {"algo": "loha", "dim": 3, "alpha": 2},
        "*.conv2": {"algo": "locon"},
    },
    "target_name": ["*.to_q", "*.conv1", "*.conv2"],
}
BY_INPUT = {"weight_decompose": True, "wd_on_out": False}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("locon", "lora", {}),
    "lora-tucker": ("locon", "lora", {"use_tucker": True}),
    "lora-rs": ("locon", "lora", {"rs_lora": True, "use_scalar": True}),
    "dora": ("locon", "dora", {"weight_decompose": True, "use_tucker": True}),
    "dora-by-input": ("locon", "lora", BY_INPUT),
    "loha": ("loha", "loha", {"use_scalar": True}),
    "loha-tucker": ("loha", "loha", {"use_tucker": True}),
    "loha-dora": ("loha", "loha", {"weight_decompose": True}),
    "lokr": ("lokr", "lokr", {}),
    "lokr-tucker": ("lokr", "lokr", {"use_tucker": True, "factor": 2}),
    "lokr-factor": ("lokr", "lokr", {"factor": 4}),
    "lokr-rs": ("lokr", "lokr", {"factor": 2, "lora_dim": 2, "rs_lora": True}),
    "lokr-both": ("lokr", "lokr", {"decompose_both": True, "factor": 8, "lora_dim": 1}),
    "lokr-whole": ("lokr", "lokr", {"full_matrix": True, "lora_dim": 10_000}),
    "lokr-unbalanced": ("lokr", "lokr", {"unbalanced_factorization": True, "factor": 2}),
    "lokr-dora": ("lokr", "lokr", BY_INPUT),
    "glora": ("glora", "glora", {}),
    "ia3": ("ia3", "ia3", {}),
    "ia3-on-input": ("ia3", "ia3", {"train_on_input": True}),
    "oft": ("diag-oft", "diag-oft", {"rescaled": True}),
    "oft-constraint": ("diag-oft", "diag-oft", {"constraint": 1e-3}),
    "boft": ("boft", "boft", {"rescaled": True, "lora_dim": 8, "preset": TARGETS}),
    "mixed": ("locon", "loha+lokr+lora", {"preset": MIXED}),
}


@pytest.fixture(scope="module")
def cascade(wide_cascade: RandomCascade) -> Cascade:
    return load_cascade(wide_cascade.stage_1, parts=Parts(text_encoder=False))


@pytest.fixture(autouse=True)
def untouched_presets() -> Iterator[None]:
    """The library keeps its presets in the class."""
    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    yield
    for name, value in before.items():
        setattr(LycorisNetwork, name, value)


def load_unet(cascade: RandomCascade) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(cascade.stage_1, subfolder="unet")
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def predict(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 3, 16, 16, generator=generator)
    states = torch.randn(2, 5, unet.config.encoder_hid_dim, generator=generator)
    return unet(sample, torch.tensor([3, 900]), encoder_hidden_states=states).sample


def train(unet: UNet2DConditionModel, algorithm: str, **options: Any) -> LycorisNetwork:
    """A network of the library with random parameters, in place on a UNet."""
    preset = options.pop("preset", ALL)
    LycorisNetwork.apply_preset({"enable_conv": True, **preset})
    options = {"lora_dim": 4, "alpha": 3.0} | options
    sizes = {"conv_lora_dim": options["lora_dim"], "conv_alpha": options["alpha"]}
    network = LycorisNetwork(unet, network_module=algorithm, **sizes, **options)
    network.apply_to()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if not name.endswith("dora_scale"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise, alpha=0.3 if parameter.ndim > 1 else 0.1)
    return network.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_what_the_library_computes(
    wide_cascade: RandomCascade, cascade: Cascade, tmp_path: Path, case: str
) -> None:
    algorithm, kind, options = CASES[case]
    unet = load_unet(wide_cascade)
    base = predict(unet)
    network = train(unet, algorithm, **dict(options))
    trained = predict(unet)
    network.save_weights(str(tmp_path / "last.safetensors"), None, {})
    cascade.add_adapter(tmp_path / "last.safetensors")
    merged = predict(cascade.stages[1].unet)
    config, _, _ = read_adapter(tmp_path)
    cascade.remove_adapters()
    effect = (trained - base).abs().max()
    assert effect > 0.05
    assert (merged - trained).abs().max() < 1e-4 * effect + 2e-5
    assert kind_of(config) == kind
    assert len(config.target_modules) == len(network.loras)
    assert torch.equal(predict(cascade.stages[1].unet), base)


@pytest.fixture
def file(wide_cascade: RandomCascade, tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of the library: the algorithm, and its options."""

    def write(algorithm: str, name: str = "last.safetensors", **options: Any) -> Path:
        network = train(load_unet(wide_cascade), algorithm, **options)
        network.save_weights(str(tmp_path / name), None, {})
        return tmp_path / name

    return write


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr", "diag-oft", "ia3"])
def test_both_prefixes_and_wrapped_unets_are_the_same(
    file: Callable[..., Path], algorithm: str
) -> None:
    path = file(algorithm, preset=TARGETS)
    tensors = load_file(path)
    config, state, _ = read_adapter(path)
    for prefix in ("lora_unet_", "lora_unet__orig_mod_", "lycoris__orig_mod_", "lycoris_module_"):
        save_file({key.replace("lycoris_", prefix, 1): t for key, t in tensors.items()}, path)
        again, same, _ = read_adapter(path)
        assert config == again
        assert state.keys() == same.keys()
        assert all(torch.equal(state[name], same[name]) for name in state)


def test_ranks_and_alphas_are_those_of_the_tensors(file: Callable[..., Path]) -> None:
    config, _, _ = read_adapter(file("locon", preset=MIXED))
    settings = {
        name.rpartition(".")[2]: (rank_of(config, name), alpha_of(config, name))
        for name in config.target_modules
    }
    assert settings == {"to_q": (4, 3.0), "conv1": (3, 2.0), "conv2": (4, 3.0)}
    json.dumps(config.to_dict())


def test_it_is_not_loaded_into_another_unet(
    file: Callable[..., Path], wide_cascade: RandomCascade
) -> None:
    path = file("lokr")
    with pytest.raises(UserError, match=r"fits no UNet here.*conv_in.lokr_w1"):
        load_cascade(stage_2=wide_cascade.stage_2, adapters=[path])
    tensors = load_file(path)
    key = "lycoris_mid_block_attentions_0_to_q.lokr_w1"
    save_file(tensors | {key: tensors[key][:, :1].contiguous()}, path)
    with pytest.raises(UserError, match=r"another shape: mid_block.attentions.0.to_q.lokr_w1"):
        load_cascade(wide_cascade.stage_1, adapters=[path])


@pytest.mark.parametrize(
    ("algorithm", "options", "sentence"),
    [
        ("lokr", {"train_norm": True}, "normalisation layers.*train without train_norm.*norm1.w_"),
        ("full", {}, "change biases.*an algorithm other than full.*diff_b"),
        ("tlora", {}, "T-LoRA, whose rank changes with the timestep.*lambda_layer"),
    ],
)
def test_what_cannot_be_merged_is_said(
    file: Callable[..., Path], algorithm: str, options: dict[str, Any], sentence: str
) -> None:
    preset = {**TARGETS, "target_name": ["mid_block.*.to_q", "mid_block.*.norm1"]}
    with pytest.raises(UserError, match=sentence) as caught:
        read_adapter(file(algorithm, preset=preset, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "part", "sentence"),
    [
        (
            "loha",
            "hada_w2_b",
            r"lacks tensors of 1 modules \(mid_block.*to_q.hada_w2_b to go with hada_w1_a",
        ),
        ("lokr", "lokr_w1", r"lacks tensors of 1 modules \(mid_block.*to_q.lokr_w1 to go with"),
        ("lokr", "lokr_w2_a", r"lacks tensors of 1 modules \(mid_block.*to_q.lokr_w2_a to go with"),
        (
            "locon",
            "lora_up.weight",
            r"lacks tensors of 1 modules \(mid_block.*to_q.lora_B.weight to go with lora_A.weight",
        ),
        ("loha", "alpha", "tensors of another kind of adapter than LoRA, without alphas"),
    ],
)
def test_what_is_missing_is_named(
    file: Callable[..., Path], algorithm: str, part: str, sentence: str
) -> None:
    path = file(algorithm, preset=TARGETS, factor=2, lora_dim=2)
    tensors = load_file(path)
    del tensors[f"lycoris_mid_block_attentions_0_to_q.{part}"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=sentence):
        read_adapter(path)


def test_without_biases_a_whole_difference_is_an_adapter(
    file: Callable[..., Path], wide_cascade: RandomCascade, cascade: Cascade
) -> None:
    path = file("full", preset=TARGETS)
    tensors = {key: t for key, t in load_file(path).items() if not key.endswith("diff_b")}
    save_file(tensors, path)
    adapter = StageAdapter.load(path)
    unet = load_unet(wide_cascade)
    name = "mid_block.attentions.0.to_q"
    change = adapter.delta(name, unet.get_submodule(name).weight)
    key = f"lycoris_{name.replace('.', '_')}.diff"
    torch.testing.assert_close(change, tensors[key])
    save_file(tensors | {key: tensors[key][:1].contiguous()}, path)
    with pytest.raises(UserError, match=f"another shape: {name}.diff"):
        cascade.add_adapter(path)


@pytest.mark.parametrize(
    "shapes",
    [
        {"hada_w1_a": (128, 2), "hada_w1_b": (2, 32), "hada_w2_a": (128, 2), "hada_w2_b": (2, 32)},
        {"lokr_w1": (8, 2), "lokr_w2": (16, 16)},
    ],
)
def test_an_update_of_other_dimensions_does_not_fit(
    wide_cascade: RandomCascade, tmp_path: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    """Of as many values as the weight of [64, 64], but [128, 32]."""
    name = "down_blocks.1.attentions.0.to_q"
    unet = load_unet(wide_cascade)
    weight = unet.get_submodule(name).weight
    assert weight.numel() == 128 * 32
    key = f"lycoris_{name.replace('.', '_')}."
    tensors = {f"{key}{part}": torch.randn(shape) for part, shape in shapes.items()}
    save_file(tensors | {f"{key}alpha": torch.tensor(2.0)}, tmp_path / "other.safetensors")
    adapter = StageAdapter.load(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        adapter.delta(name, weight)
