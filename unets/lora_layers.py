"""Frozen layers and their LoRA as one operation: 8 matrix products instead of PEFT's 16 kernels.

Modules stay PEFT's own, with their names and parameters; only their forward passes change, and only
if the layer computes exactly W x + b + s B A x (LoRA, Hu et al. 2021, equation 3).
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from torch import Tensor, nn

from unets.frozen import ConvSettings, FrozenConv2d, FrozenLinear, conv_settings

LAST = torch.channels_last


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """Compute a factor times a matrix product, as one kernel."""
    nothing = left.new_empty(()).expand(len(left), right.shape[1])
    return torch.addmm(nothing, left, right, beta=0, alpha=factor)


class _AdaptedLinear(torch.autograd.Function):
    """The operation W x + b + s B A x, which keeps h = A x for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, a: Tensor, b: Tensor, scaling: float, layer: nn.Linear
    ) -> Tensor:
        """Map [..., in] to [..., out], with A [rank, in] and B [out, rank]."""
        rows = inputs.flatten(0, -2)
        hidden = rows @ a.T
        result = F.linear(rows, layer.weight, layer.bias).addmm_(hidden, b.T, alpha=scaling)
        ctx.save_for_backward(rows, hidden, a, b)
        ctx.scaling, ctx.layer, ctx.shape = scaling, layer, inputs.shape
        return result.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        """Map the gradient [..., out] to those of x [..., in] (if needed), A and B."""
        rows, hidden, a, b = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        of_hidden = _product(gradient, b, ctx.scaling)
        of_b = _product(gradient.T, hidden, ctx.scaling)
        of_inputs = None
        if ctx.needs_input_grad[0]:
            of_inputs = (gradient @ ctx.layer.weight).addmm_(of_hidden, a).view(ctx.shape)
        return of_inputs, of_hidden.T @ rows, of_b, None, None


class _AdaptedConv2d(torch.autograd.Function):
    """The operation W * x + s B (A * x) on channels_last pictures, with the 1 x 1 B as a matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        layer: FrozenConv2d,
        bias: Tensor | None,
    ) -> Tensor:
        """Map [N, in, H, W] to [N, out, h, w], with A [rank, in, k, k] and B [out, rank, 1, 1]."""
        settings = conv_settings(layer)
        # a GPU's results are channels_last already, but those on the meta device need not be
        hidden = F.conv2d(inputs, a, None, *settings).contiguous(memory_format=LAST)
        result = F.conv2d(inputs, layer.weight, bias, *settings).contiguous(memory_format=LAST)
        _rows(result).addmm_(_rows(hidden), b.flatten(1).T, alpha=scaling)
        ctx.save_for_backward(inputs, hidden, a, b)
        ctx.scaling, ctx.layer, ctx.settings = scaling, layer, settings
        return result

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        """Map the gradient [N, out, h, w] to those of x [N, in, H, W] (if needed), A and B."""
        inputs, hidden, a, b = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=LAST)
        rows, b_rows, scaling = _rows(gradient), b.flatten(1), ctx.scaling
        of_hidden = _product(rows, b_rows, scaling)
        of_b = _product(rows.T, _rows(hidden), scaling).view(b.shape)
        of_hidden = of_hidden.view(hidden.movedim(1, -1).shape).movedim(-1, 1)
        wanted = ctx.needs_input_grad[0]
        of_inputs, of_a = _conv2d_gradients(of_hidden, inputs, a, ctx.settings, (wanted, True))
        if of_inputs is not None:
            frozen = ctx.layer.weight
            of_inputs += _conv2d_gradients(gradient, inputs, frozen, ctx.settings, (True, False))[0]
        return of_inputs, of_a, of_b, None, None, None


def _rows(pictures: Tensor) -> Tensor:
    """View channels_last pictures [B, C, H, W] as rows [B * H * W, C] in the same memory."""
    return pictures.movedim(1, -1).view(-1, pictures.shape[1])


def _conv2d_gradients(
    gradient: Tensor,
    inputs: Tensor,
    weight: Tensor,
    settings: ConvSettings,
    wanted: tuple[bool, bool],
) -> tuple[Any, Any]:
    """Compute the gradients of a convolution's input and weight, each only if wanted."""
    sizes, groups = settings[:3], settings[3]
    return torch.ops.aten.convolution_backward(
        gradient, inputs, weight, None, *sizes, False, [0, 0], groups, [*wanted, False]
    )[:2]


def _plain_adapter(layer: LoraLayer, inputs: Tensor) -> str | None:
    """Return the name of the one adapter that a layer applies, or ``None`` if PEFT must run it.

    PEFT runs layers that are merged, disabled, apply dropout or are a variant such as DoRA, and
    those that the compiler itself fuses.
    """
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or layer.disable_adapters or layer.lora_variant or len(active) != 1:
        return None
    (name,) = active
    a, b = layer.lora_A[name], layer.lora_B[name]
    drops = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    if drops or torch.compiler.is_compiling() or a.weight.dtype != inputs.dtype:
        return None
    return None if b.bias is not None else name


class AdaptedLinear(Linear):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's LoRA of a frozen Linear."""

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map [..., in] to [..., out]."""
        name = None if args or kwargs else _plain_adapter(self, inputs)
        if name is None:
            return super().forward(inputs, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _AdaptedLinear.apply(inputs, a, b, self.scaling[name], self.base_layer)


class AdaptedConv2d(Conv2d):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's LoRA of a frozen Conv2d."""

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map [B, in, H, W] to [B, out, h, w]."""
        result = None if args or kwargs else self._fused(inputs, self.base_layer.bias)
        return super().forward(inputs, *args, **kwargs) if result is None else result

    def without_bias(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the result before the bias is added, and the bias; ``None``: already added."""
        if self.disable_adapters and not self.merged:
            return self.base_layer.without_bias(inputs)
        result = self._fused(inputs, None)
        return (super().forward(inputs), None) if result is None else (result, self.base_layer.bias)

    def _fused(self, inputs: Tensor, bias: Tensor | None) -> Tensor | None:
        name = _plain_adapter(self, inputs)
        if name is None or not inputs.is_contiguous(memory_format=LAST):
            return None
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _AdaptedConv2d.apply(inputs, a, b, self.scaling[name], self.base_layer, bias)


FUSED = {Linear: (FrozenLinear, AdaptedLinear), Conv2d: (FrozenConv2d, AdaptedConv2d)}
"""The base layer with which each of PEFT's LoRA layers is fused, and the class of the result."""


def fuse_adapters(model: nn.Module) -> None:
    """Give the LoRAs of a model's frozen layers their fused forward pass, in place."""
    for layer in model.modules():
        base, fused = FUSED.get(type(layer), (None, None))
        if base is not None and isinstance(layer.base_layer, base):
            layer.__class__ = fused
