"""Frozen Linear and Conv2d layers, in full precision or quantised.

A frozen layer keeps only its weight for the backward pass, since only the weight's gradient would
need the input. A quantised layer restores its weight in the forward pass and again in the backward
pass, and does not keep it after either.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

NF4_BLOCK = 64
"""The number of weights that share one scale in NF4 (QLoRA, Dettmers et al. 2023, section 3)."""

UNQUANTISED = ("conv_in", "conv_out", "time_embedding", "add_embedding", "encoder_hid_proj")
"""A UNet's first and last layers and its embeddings: small, sensitive and never quantised."""


class Format(NamedTuple):
    """A way to store a quantised weight as two tensors, codes and their scales."""

    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    """A function from the weight, [out, ...] and contiguous, to codes and scales."""
    restore: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]
    """A function from codes, scales, a shape and a dtype to the weight."""


def _quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = weight.flatten(1)
    # the GPU's kernel takes only fp16, the CPU's float32
    codes, largest, _ = bnb.int8_vectorwise_quant(rows.half() if rows.is_cuda else rows.float())
    return codes.view_as(weight), largest / 127


def _restore_int8(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    # with out=, a GPU rounds the product to dtype without a float32 copy of the weight
    weight = torch.empty(shape, dtype=dtype, device=codes.device)
    return torch.mul(codes, scales.view(-1, *[1] * (len(shape) - 1)), out=weight)


def _quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, state = bnb.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    return codes, state.absmax


def _restore_nf4(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    state = bnb.QuantState(scales, shape, dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4")
    return bnb.dequantize_4bit(codes, state)


FORMATS: Mapping[str, Format] = {
    "int8": Format(_quantise_int8, _restore_int8),  # LLM.int8(): one scale for each output
    "nf4": Format(_quantise_nf4, _restore_nf4),  # QLoRA: one scale for each block
}
"""Quantised formats by name, implemented by bitsandbytes."""

ConvSettings: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""The stride, padding, dilation and groups of a convolution."""


def conv_settings(layer: nn.Conv2d) -> ConvSettings:
    """Return the settings of a convolution, in the order that PyTorch's functions take."""
    assert not isinstance(layer.padding, str)
    return layer.stride, layer.padding, layer.dilation, layer.groups


class _Linear(torch.autograd.Function):
    """A Linear, or a 1 x 1 convolution on rows of channels."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, layer: nn.Linear | nn.Conv2d, bias: Tensor | None
    ) -> Tensor:
        ctx.layer = layer
        return F.linear(inputs, layer.weight.flatten(1), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.layer.weight.flatten(1), None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: nn.Conv2d, bias: Tensor | None) -> Tensor:
        ctx.layer, ctx.shape = layer, inputs.shape
        return F.conv2d(inputs, layer.weight, bias, *conv_settings(layer))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, settings = ctx.layer.weight, conv_settings(ctx.layer)
        return conv2d_input(ctx.shape, weight, gradient, *settings), None, None


class Converted(type):
    """The metaclass of layers that are converted from plain ones and never constructed.

    PEFT makes the ``lora_A`` and ``lora_B`` of a convolution with ``type(base_layer)(...)``. These
    must train, so calling the class of a frozen layer constructs its ``plain`` counterpart.
    """

    plain: type[nn.Module]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Construct the plain layer."""
        return cls.plain(*args, **kwargs)


class FrozenLinear(nn.Linear, metaclass=Converted):
    """A Linear that computes only the gradient of its input."""

    plain = nn.Linear

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        if torch.compiler.is_compiling():  # the compiler itself decides what to keep
            return super().forward(inputs)
        result: Tensor = _Linear.apply(inputs, self, self.bias)
        return result


class FrozenConv2d(nn.Conv2d, metaclass=Converted):
    """A Conv2d that computes only the gradient of its input."""

    plain = nn.Conv2d

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, out, h, w]."""
        return self._convolve(inputs, self.bias)

    def without_bias(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the result before the bias is added, and the bias."""
        return self._convolve(inputs, None), self.bias

    def _convolve(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return self._conv_forward(inputs, self.weight, bias)
        # a 1 x 1 convolution of channels_last pictures is a matrix product of rows of channels
        size = (self.kernel_size, self.stride, self.padding, self.groups)
        channels_last = inputs.is_contiguous(memory_format=torch.channels_last)
        result: Tensor
        if channels_last and size == ((1, 1), (1, 1), (0, 0), 1):
            result = _Linear.apply(inputs.movedim(1, -1), self, bias).movedim(-1, 1)
        else:
            result = _Conv2d.apply(inputs, self, bias)
        return result


@dataclass(eq=False)
class Overlay:
    """Merged adapters over a quantised layer's own weight W: gain ⊙ W + dense + B A.

    W is a matrix [out, in]; a convolution's columns are in the order of its codes. A CUDA graph of
    the layer reads these tensors at their addresses, so change values in place and never replace a
    tensor.
    """

    b: Tensor
    """The matrix B, [out, rank], in the layer's precision."""
    a: Tensor
    """The matrix A, [rank, in], in the layer's precision."""
    gain: Tensor | None = None
    """Row factors, [out, 1] float32, since rounding one would change a whole row; ``None``: 1."""
    dense: Tensor | None = None
    """A matrix to add, [out, in], in the layer's precision; ``None``: zero."""

    def apply_(self, rows: Tensor) -> None:
        """Turn the restored weight W, as rows, into the merged weight, in place."""
        if self.gain is not None:
            rows.mul_(self.gain)
        if self.dense is not None:
            rows.add_(self.dense)
        if len(self.a):
            rows.addmm_(self.b, self.a)


class Quantised(nn.Module):
    """A frozen layer that stores codes and scales; reading ``weight`` restores it.

    A convolution's codes are in the order [out, kernel, kernel, in], so that the restored weight is
    channels_last without a copy.
    """

    codes: Tensor
    scales: Tensor
    format: str
    shape: torch.Size
    dtype: torch.dtype
    overlay: Overlay | None = None
    """Merged adapters; ``None``: none."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantised":
        """Move the overlay along with the codes, as for ``to``."""
        super()._apply(fn, recurse)
        if self.overlay is not None:
            tensors = vars(self.overlay).items()
            self.overlay = replace(self.overlay, **{n: fn(t) for n, t in tensors if t is not None})
        return self

    @property
    def own_weight(self) -> Tensor:
        """The weight without the overlay, restored."""
        return self._restore(None)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, restored."""
        return self._restore(self.overlay)

    def _restore(self, overlay: Overlay | None) -> Tensor:
        rows = FORMATS[self.format].restore(self.codes, self.scales, self.shape, self.dtype)
        if overlay is not None:
            overlay.apply_(rows.view(len(rows), -1))
        return rows if rows.dim() == 2 else rows.permute(0, 3, 1, 2)


class QuantisedLinear(Quantised, FrozenLinear):  # type: ignore[override]  # the weight is read-only
    """A frozen Linear with a quantised weight."""


class QuantisedConv2d(Quantised, FrozenConv2d):  # type: ignore[override]  # the weight is read-only
    """A frozen Conv2d with a quantised weight."""


FROZEN: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d}
QUANTISED: dict[type[nn.Module], type[Quantised]] = {
    FrozenLinear: QuantisedLinear,
    FrozenConv2d: QuantisedConv2d,
}


def freeze(model: nn.Module) -> None:
    """Freeze every Linear and Conv2d of a model, in place."""
    model.requires_grad_(False)
    for layer in model.modules():
        if type(layer) in FROZEN:
            layer.__class__ = FROZEN[type(layer)]


def quantisable(model: nn.Module) -> list[str]:
    """List the names of the frozen layers that a quantised base quantises."""
    return [
        name
        for name, layer in model.named_modules()
        if type(layer) in QUANTISED and not name.startswith(UNQUANTISED)
    ]


def quantise(layer: nn.Module, weight: Tensor, format: str, dtype: torch.dtype) -> None:  # noqa: A002
    """Make a frozen layer store ``weight`` quantised, on its device, and read it as ``dtype``."""
    del layer.weight  # a property replaces this parameter
    layer.__class__ = QUANTISED[type(layer)]
    assert isinstance(layer, Quantised)
    rows = weight.detach() if weight.dim() == 2 else weight.detach().permute(0, 2, 3, 1)
    layer.format, layer.shape, layer.dtype = format, rows.shape, dtype
    codes, scales = FORMATS[format].quantise(rows.contiguous())
    layer.register_buffer("codes", codes)
    layer.register_buffer("scales", scales)
