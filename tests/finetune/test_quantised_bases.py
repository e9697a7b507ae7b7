"""Quantisation of a base: the layers it touches, and how far it moves a weight."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from adapters.base.source import Source
from tests.builders.random_cascade import RandomCascade
from unets.frozen import FORMATS, Quantised

SENSITIVE = ("conv_in", "conv_out", "time_embedding", "encoder_hid_proj", "add_embedding")


def pair(
    cascade: RandomCascade, stage: int, precision: str
) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """diffusers' UNet in float32, and the one that a run loads."""
    place = {1: cascade.stage_1, 2: cascade.stage_2}[stage]
    plain = UNet2DConditionModel.from_pretrained(place, subfolder="unet")
    return plain, Source(str(place), stage).unet(precision, torch.device("cpu"))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", FORMATS)
def test_first_and_last_layers_and_embeddings_stay_as_they_are(
    random_cascade: RandomCascade, stage: int, precision: str
) -> None:
    plain, unet = pair(random_cascade, stage, precision)
    for name in SENSITIVE:
        before = plain.get_submodule(name).state_dict()
        after = unet.get_submodule(name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    changed = {name for name, module in unet.named_modules() if isinstance(module, Quantised)}
    kept = (*SENSITIVE, "class_embedding")
    weights = {
        n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert {name for name in weights if not name.startswith(kept)} <= changed


def test_int8_rounds_each_row_to_127_steps_of_its_largest_value(
    random_cascade: RandomCascade,
) -> None:
    """LLM.int8()'s vector-wise quantisation (arXiv 2208.07339, section 2.2), in float64."""
    plain, unet = pair(random_cascade, 1, "int8")
    for name, module in unet.named_modules():
        if isinstance(module, Quantised):
            weight = plain.get_submodule(name).weight.detach().double()
            rows = weight.flatten(1)
            step = rows.abs().amax(1, keepdim=True) / 127
            restored = module.weight.double().flatten(1)
            assert ((restored - rows).abs() / step).max() < 0.51, name
            codes = restored / step
            assert (codes - codes.round()).abs().max() < 1e-3, name
            assert codes.abs().amax(1).sub(127).abs().max() < 1e-3, name
