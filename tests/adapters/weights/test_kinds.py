"""Attaching adapters: what they match, what trains, and that a fresh one changes nothing."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from adapters.errors import UserError
from adapters.weights.kinds import KINDS, PRESETS, AdapterSpec, adapter_state, attach, match_targets
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import load_unet, output, unet_inputs

SPECS = [
    AdapterSpec(kind=kind, rank=4, alpha=6.0, targets=targets)
    for kind in KINDS
    for targets in ("attention", "all")
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.targets}")
def test_a_fresh_adapter_changes_nothing_and_alone_trains(
    random_cascade: RandomCascade, spec: AdapterSpec
) -> None:
    unet = load_unet(random_cascade.stage_2)
    inputs = unet_inputs(unet)
    base = output(unet, inputs)
    parameters = attach(unet, spec)
    # OFT multiplies by the identity, which makes the next kernel's input contiguous
    tolerance = 1e-5 if spec.kind == "oft" else 0
    torch.testing.assert_close(output(unet, inputs), base, rtol=0, atol=tolerance)
    unet.train()
    unet(**inputs).sample.square().mean().backward()
    trained = {name for name, p in unet.named_parameters() if p.grad is not None}
    assert trained == set(parameters)
    assert any(p.grad.abs().sum() > 0 for p in parameters.values())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_on_a_bfloat16_base_an_adapter_is_float32_and_still_changes_nothing(
    random_cascade: RandomCascade, kind: str
) -> None:
    unet = UNet2DConditionModel.from_pretrained(
        random_cascade.stage_1, subfolder="unet", dtype=torch.bfloat16
    )
    unet.eval().requires_grad_(False)
    inputs = unet_inputs(unet, torch.bfloat16)
    base = output(unet, inputs)
    parameters = attach(unet, AdapterSpec(kind=kind, targets="attention+conv"))
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert torch.equal(output(unet, inputs), base)


def test_the_seed_decides_and_the_global_generator_does_not(random_cascade: RandomCascade) -> None:
    def fresh(seed: int) -> dict[str, Tensor]:
        unet = load_unet(random_cascade.stage_1)
        before = torch.get_rng_state()
        attach(unet, AdapterSpec(), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return adapter_state(unet)

    first, again = fresh(1), fresh(1)
    torch.rand(3)
    other = fresh(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_new_layers_are_in_the_mode_of_the_unet(random_cascade: RandomCascade) -> None:
    unet = load_unet(random_cascade.stage_1)
    attach(unet, AdapterSpec(dropout=0.5))
    assert not any(module.training for module in unet.modules())


def test_the_attention_preset_reaches_the_text_path(random_cascade: RandomCascade) -> None:
    names = match_targets(load_unet(random_cascade.stage_1), "attention")
    endings = {name.split(".attentions.")[1].split(".", 1)[1] for name in names}
    assert endings == set(PRESETS["attention"])


def test_presets_grow(random_cascade: RandomCascade) -> None:
    unet = load_unet(random_cascade.stage_2)
    attention, conv, everything = (set(match_targets(unet, preset)) for preset in PRESETS)
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    assert attention < conv < everything
    assert everything == {n for n, module in unet.named_modules() if isinstance(module, layers)}


def test_patterns_match_names_and_endings(random_cascade: RandomCascade) -> None:
    unet = load_unet(random_cascade.stage_1)
    assert match_targets(unet, ["mid_block.*.to_q"]) == ("mid_block.attentions.0.to_q",)
    assert match_targets(unet, "conv_in") == ("conv_in",)
    assert all(name.endswith(".to_q") for name in match_targets(unet, "to_q"))


def test_a_pattern_without_a_match_names_the_closest(random_cascade: RandomCascade) -> None:
    unet = load_unet(random_cascade.stage_1)
    with pytest.raises(UserError, match=r"'add_k_prj' matches no .* closest are add_k_proj"):
        match_targets(unet, ["to_q", "add_k_prj"])


def test_oft_refuses_convolutions(random_cascade: RandomCascade) -> None:
    unet = load_unet(random_cascade.stage_1)
    with pytest.raises(UserError, match="'oft' adapts Linear modules only"):
        attach(unet, AdapterSpec(kind="oft", targets="attention+conv"))
    parameters = attach(unet, AdapterSpec(kind="oft", targets="all"))
    assert not any(".conv1." in name for name in parameters)
