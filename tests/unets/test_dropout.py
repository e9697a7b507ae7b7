"""Dropout's masks are functions of key, layer and element: fair, and the same wherever."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.oft.layer import OFTRotationModule
from torch import nn

from adapters.base.source import Source
from adapters.weights.kinds import KINDS, AdapterSpec, adapter_parameters, attach
from tests.builders.random_cascade import RandomCascade
from tests.builders.trainees import batch_of, take_steps, trainee_of
from unets.dropout import DropoutKeys, KeyedDropout, hash_bits, key_dropout
from unets.lora_layers import AdaptedLinear, fuse_adapters
from unets.precision import Precision

CPU = torch.device("cpu")


def keys_of(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2**62, (count, 2), generator=draw)


def keyed_lowbias32(key: int, layer: int, element: int) -> int:
    """The hash in whole numbers, without a sign."""
    word = 2**32
    salt = layer * 0x9E3779B9
    bits = (element + key + salt) % word
    bits = (bits ^ bits >> 16) * 0x7FEB352D % word
    bits = (bits + (key >> 32) + salt) % word
    bits = (bits ^ bits >> 15) * 0x846CA68B % word
    return bits ^ bits >> 16


def test_the_hash_is_lowbias32_with_a_key_of_64_bits() -> None:
    keys = [3, 3 + 2**32, 2**62 - 5, *keys_of(4)[:, 0].tolist()]
    for layer in (0, 1, 300):
        bits = hash_bits(torch.tensor(keys), layer, 50).tolist()
        expected = [[keyed_lowbias32(key, layer, i) for i in range(50)] for key in keys]
        assert [[value % 2**32 for value in row] for row in bits] == expected
    assert bits[0] != bits[1]


def test_the_hash_is_even_and_its_rows_have_nothing_in_common() -> None:
    count = 2**16
    keys = keys_of(3)[:, 0]
    keys[1] = keys[0] + 1
    rows = torch.cat([hash_bits(keys, layer, count) for layer in (0, 1, 2)])
    counts = np.stack([np.histogram(row, 256, (-(2**31), 2**31))[0] for row in rows.numpy()])
    expected = count / 256
    chi_square = ((counts - expected) ** 2 / expected).sum(1)
    assert (abs(chi_square - 255) < 5 * (2 * 255) ** 0.5).all()
    shifted = torch.cat([rows, rows[:1].roll(1), rows[:1].roll(64)]).double()
    correlations = torch.corrcoef(shifted).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / count**0.5
    for bit in (0, 8, 16, 31):  # not the highest bits alone
        assert abs(((rows >> bit) & 1).double().mean(1) - 0.5).max() < 5 * 0.5 / count**0.5


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_picture_drops_its_share_whatever_is_beside_it(share: float) -> None:
    keys = DropoutKeys(keys_of(4))
    dropout = KeyedDropout(share, 7, keys).train()
    inputs = torch.rand(4, 8, 40, 50) + 1
    together = dropout(inputs)
    dropped = (together == 0).flatten(1).double().mean(1)
    assert (abs(dropped - share) < 5 * (share * (1 - share) / 16_000) ** 0.5).all()
    kept = together != 0
    assert torch.allclose(together[kept], inputs[kept] / (1 - share))
    for picture in range(4):
        keys.values = keys_of(4)[picture : picture + 1]
        assert torch.equal(dropout(inputs[picture : picture + 1])[0], together[picture])
    in_memory_order = inputs.to(memory_format=torch.channels_last)
    keys.values = keys_of(4)
    assert torch.equal(dropout(in_memory_order), together)
    assert torch.equal(dropout.eval()(inputs), inputs)


def adapted(cascade: RandomCascade, kind: str) -> UNet2DConditionModel:
    unet = Source(str(cascade.stage_1), 1).unet("fp32", CPU)
    attach(unet, AdapterSpec(kind=kind, rank=8, dropout=0.4))
    for parameter in adapter_parameters(unet).values():
        nn.init.normal_(parameter, std=0.1)
    return unet.train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_the_same_parameters_and_the_same_output_when_it_evaluates(
    random_cascade: RandomCascade, kind: str
) -> None:
    unet = adapted(random_cascade, kind)
    names = list(unet.state_dict())
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(2, 3, 16, 16, generator=draw),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=draw),
        "timestep": torch.tensor([3, 700]),
    }
    with torch.no_grad():
        plain = unet.eval()(**inputs).sample
        keys = key_dropout(unet, 0.4)
        assert list(unet.state_dict()) == names
        assert torch.equal(unet(**inputs).sample, plain)
        unet.train()
        outputs = []
        for seed in (0, 0, 1):
            keys.values = keys_of(2, seed)
            outputs.append(unet(**inputs).sample)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], plain)


def test_a_fused_lora_drops_as_the_plain_one_does(random_cascade: RandomCascade) -> None:
    unet = adapted(random_cascade, "lora")
    fuse_adapters(unet)
    keys = key_dropout(unet, 0.4)
    keys.values = keys_of(2)
    layer = unet.mid_block.attentions[0].to_q
    assert isinstance(layer, AdaptedLinear)
    x = torch.randn(2, 3, layer.in_features)
    kept = keys.keep_inputs(0.4, layer.lora_dropout["default"].layer, x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + x * kept / 0.6 @ a.T @ b.T
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_an_update_loses_rows(random_cascade: RandomCascade, kind: str) -> None:
    unet = adapted(random_cascade, kind)
    layers = [layer for layer in unet.modules() if isinstance(layer, LycorisLayer)]
    whole = [layer.get_delta_weight("default") for layer in layers]
    keys = key_dropout(unet, 0.4)
    keys.values = keys_of(3)
    shares = []
    for layer, weight in zip(layers, whole, strict=True):
        assert torch.equal(layer.get_delta_weight("default"), weight)
        less = layer.get_delta_weight("default", apply_rank_dropout=True)
        kept = less.abs().sum(1) > 0
        scale = 1 / kept.float().mean() if kind == "loha" else 1
        assert torch.allclose(less[kept], weight[kept] * scale)
        shares.append(kept.float().mean())
    assert torch.stack(shares).mean().item() == pytest.approx(0.6, abs=0.05)
    assert len(set(shares)) > 1


def test_an_orthogonal_adapter_loses_blocks(random_cascade: RandomCascade) -> None:
    unet = adapted(random_cascade, "oft")
    rotations = [module for module in unet.modules() if isinstance(module, OFTRotationModule)]
    whole = [module._cayley_batch(module.weight, module.block_size) for module in rotations]
    keys = key_dropout(unet, 0.4)
    keys.values = keys_of(3)
    identity_blocks = []
    for module, blocks in zip(rotations, whole, strict=True):
        less = module._cayley_batch(module.weight, module.block_size)
        for block, rotated in zip(less, blocks, strict=True):
            dropped = torch.equal(block, torch.eye(module.block_size))
            assert dropped or torch.equal(block, rotated)
            identity_blocks.append(dropped)
    assert np.mean(identity_blocks) == pytest.approx(0.4, abs=0.12)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_with_dropout_on_a_base_of_any_precision(
    random_cascade: RandomCascade, kind: str, precision: Precision
) -> None:
    spec = AdapterSpec(kind=kind, rank=2, dropout=0.1, targets="all")
    trainee = trainee_of(random_cascade.stage_1, 1, precision, adapter=spec)
    losses = take_steps(trainee, 2)
    assert all(loss > 0 for loss in losses)
    assert trainee.weights.values.isfinite().all()


def test_a_dora_that_drops_nothing_is_pefts_own(random_cascade: RandomCascade) -> None:
    """Of the dropped input, the part that the base's weight has in the result."""
    gradients = []
    for dropout in (0.0, 1e-9):
        spec = AdapterSpec(kind="dora", rank=2, dropout=dropout, targets="attention+conv")
        trainee = trainee_of(random_cascade.stage_1, 1, adapter=spec)
        trainee.weights.values += 0.02 * torch.randn(
            trainee.weights.values.shape, generator=torch.Generator().manual_seed(0)
        )
        trainee.accumulate(batch_of(trainee))
        gradients.append(trainee.weights.gradient)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)
