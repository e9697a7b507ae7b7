"""The fused LoRA of frozen layers, against its definition in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn

from adapters.weights.kinds import without_adapter
from unets.frozen import freeze
from unets.lora_layers import AdaptedConv2d, AdaptedLinear, fuse_adapters

RANK, ALPHA = 3, 5.0

SCALE = ALPHA / RANK


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


def fused(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A frozen layer with a fused LoRA whose B is not zero."""
    model = nn.Sequential(layer)
    freeze(model)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False)
    model[0] = kind(model[0], "default", config, r=RANK, lora_alpha=ALPHA)
    nn.init.normal_(model[0].lora_B["default"].weight)
    fuse_adapters(model)
    return model[0]


def check(layer: nn.Module, inputs: Tensor, define: Callable[..., Tensor]) -> Tensor:
    """Hold result and gradients to ``define`` of input, weight, bias, A and B in float64."""
    base = layer.base_layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    result = layer(inputs.requires_grad_())
    gradient = torch.randn_like(result)
    result.backward(gradient)
    x, a64, b64 = exact = [t.detach().double().requires_grad_() for t in (inputs, a, b)]
    expected = define(x, base.weight.detach().double(), base.bias.detach().double(), a64, b64)
    expected.backward(gradient.double())
    assert relative(result, expected) < 1e-5
    for mine, right in zip((inputs, a, b), exact, strict=True):
        assert relative(mine.grad, right.grad) < 1e-5
    return result


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 1), (3, 2)])
def test_a_convolution_and_its_lora(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = fused(nn.Conv2d(8, 12, kernel, stride, kernel // 2), Conv2d)
    assert isinstance(layer, AdaptedConv2d)
    pictures = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)

    def define(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = F.conv2d(x, a, None, stride, kernel // 2)
        return F.conv2d(x, weight, bias, stride, kernel // 2) + SCALE * F.conv2d(hidden, b)

    result = check(layer, pictures, define)
    without, offset = layer.without_bias(pictures)
    assert torch.allclose(without + offset.view(1, -1, 1, 1), result, atol=1e-5)


def test_a_linear_and_its_lora() -> None:
    torch.manual_seed(0)
    layer = fused(nn.Linear(8, 12), Linear)
    assert isinstance(layer, AdaptedLinear)
    check(
        layer,
        torch.randn(2, 5, 8),
        lambda x, weight, bias, a, b: F.linear(x, weight, bias) + SCALE * x @ a.T @ b.T,
    )


def test_without_the_adapter_a_fused_layer_is_its_base() -> None:
    torch.manual_seed(0)
    pictures = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    convolution = fused(nn.Conv2d(8, 12, 3, 1, 1), Conv2d)
    linear = fused(nn.Linear(8, 12), Linear)
    with without_adapter(nn.ModuleList([convolution, linear])):
        assert torch.equal(convolution(pictures), convolution.base_layer(pictures))
        without, offset = convolution.without_bias(pictures)
        expected, bias = convolution.base_layer.without_bias(pictures)
        assert torch.equal(without, expected)
        assert offset is bias
        rows = torch.randn(2, 5, 8)
        assert torch.equal(linear(rows), linear.base_layer(rows))
    assert not torch.equal(convolution(pictures), convolution.base_layer(pictures))
    assert not torch.equal(linear(rows), linear.base_layer(rows))
