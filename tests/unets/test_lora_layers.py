"""The fused LoRA of frozen layers, against its definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn

from unets.frozen import freeze
from unets.lora_layers import AdaptedConv2d, AdaptedLinear, fuse_adapters

RANK, ALPHA = 3, 5.0


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


def adapted(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A frozen layer with a fused LoRA whose B is not zero."""
    model = nn.Sequential(layer)
    freeze(model)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False)
    model[0] = kind(model[0], "default", config, r=RANK, lora_alpha=ALPHA)
    nn.init.normal_(model[0].lora_B["default"].weight)
    fuse_adapters(model)
    return model[0]


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 1), (3, 2)])
def test_a_convolution_and_its_lora(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, kernel, stride, kernel // 2)
    weight, bias = plain.weight.detach().double(), plain.bias.detach().double()
    layer = adapted(plain, Conv2d)
    assert isinstance(layer, AdaptedConv2d)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    pictures = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    pictures.requires_grad_()
    result = layer(pictures)
    gradient = torch.randn_like(result)
    result.backward(gradient)

    exact = [t.detach().double().requires_grad_() for t in (pictures, a, b)]
    inputs, a64, b64 = exact
    hidden = F.conv2d(inputs, a64, None, stride, kernel // 2)
    expected = F.conv2d(inputs, weight, bias, stride, kernel // 2)
    expected = expected + ALPHA / RANK * F.conv2d(hidden, b64)
    expected.backward(gradient.double())
    assert relative(result, expected) < 1e-5
    for mine, right in zip((pictures, a, b), exact, strict=True):
        assert relative(mine.grad, right.grad) < 1e-5
    without, offset = layer.without_bias(pictures)
    assert torch.allclose(without + offset.view(1, -1, 1, 1), result, atol=1e-5)


def test_a_linear_and_its_lora() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 12)
    weight, bias = plain.weight.detach().double(), plain.bias.detach().double()
    layer = adapted(plain, Linear)
    assert isinstance(layer, AdaptedLinear)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rows = torch.randn(2, 5, 8, requires_grad=True)
    result = layer(rows)
    gradient = torch.randn_like(result)
    result.backward(gradient)
    exact = [t.detach().double().requires_grad_() for t in (rows, a, b)]
    inputs, a64, b64 = exact
    expected = F.linear(inputs, weight, bias) + ALPHA / RANK * inputs @ a64.T @ b64.T
    expected.backward(gradient.double())
    assert relative(result, expected) < 1e-5
    for mine, right in zip((rows, a, b), exact, strict=True):
        assert relative(mine.grad, right.grad) < 1e-5
