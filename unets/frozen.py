"""Linear and Conv2d layers whose weight never trains, in full precision or quantised.

A frozen layer keeps nothing for the backward pass but its weight: what it was given is not stored,
since only a gradient of the weight would need it. A quantised one restores its weight in the
forward pass and once more in the backward pass, and keeps it in neither.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

NF4_BLOCK = 64
"""How many weights of an NF4 layer share one scale."""

UNQUANTISED = ("conv_in", "conv_out", "time_embedding", "add_embedding", "encoder_hid_proj")
"""The first and last layers of a UNet and its embeddings, small and sensitive: never quantised."""


@dataclass(frozen=True)
class Format:
    """How a quantised weight is stored, as two tensors: its codes and their scales."""

    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    """From the weight, [out, ...] and contiguous."""
    restore: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]
    """The weight in a shape and precision, from its codes and scales."""


def _quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = weight.flatten(1)
    half = rows.half() if rows.is_cuda else rows.float()  # all that its kernels take
    codes, largest, _ = bnb.int8_vectorwise_quant(half)
    return codes.view_as(weight), largest / 127


def _restore_int8(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    weight = torch.empty(shape, dtype=dtype, device=codes.device)
    return torch.mul(codes, scales.view(-1, *[1] * (len(shape) - 1)), out=weight)


def _quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, state = bnb.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    return codes, state.absmax


def _restore_nf4(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    state = bnb.QuantState(scales, shape, dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4")
    return bnb.dequantize_4bit(codes, state)


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "int8": Format(_quantise_int8, _restore_int8),  # LLM.int8(): one scale an output
        "nf4": Format(_quantise_nf4, _restore_nf4),  # QLoRA: one scale a block
    }
)
"""Quantised formats by name, in bitsandbytes' own functions."""


class _Linear(torch.autograd.Function):
    """Of a Linear, or of a convolution of 1 x 1 on rows of channels."""

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
        return F.conv2d(
            inputs,
            layer.weight,
            bias,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        layer = ctx.layer
        return (
            conv2d_input(
                ctx.shape,
                layer.weight,
                gradient,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
            ),
            None,
            None,
        )


class Converted(type):
    """The metaclass of layers that are converted from plain ones, and never constructed.

    PEFT makes the ``lora_A`` and ``lora_B`` of a convolution with ``type(base_layer)(...)``. They
    must train, so calling the class of a frozen layer constructs its plain, trainable counterpart.
    """

    plain: type[nn.Module]
    """The class that calling this one constructs."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Construct the plain layer."""
        return cls.plain(*args, **kwargs)


class FrozenLinear(nn.Linear, metaclass=Converted):
    """A Linear that returns the gradient of its input only."""

    plain = nn.Linear

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if torch.compiler.is_compiling():  # the compiler decides itself what to keep
            return super().forward(inputs)
        result: Tensor = _Linear.apply(inputs, self, self.bias)
        return result


class FrozenConv2d(nn.Conv2d, metaclass=Converted):
    """A Conv2d that returns the gradient of its input only."""

    plain = nn.Conv2d

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, h, w]."""
        return self._convolved(inputs, self.bias)

    def without_bias(self, inputs: Tensor) -> Tensor:
        """The same, for a bias that is added elsewhere."""
        return self._convolved(inputs, None)

    def _convolved(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return self._conv_forward(inputs, self.weight, bias)
        result: Tensor
        if self.weights_alone and inputs.is_contiguous(memory_format=torch.channels_last):
            result = _Linear.apply(inputs.movedim(1, -1), self, bias).movedim(-1, 1)
        else:
            result = _Conv2d.apply(inputs, self, bias)
        return result

    @property
    def weights_alone(self) -> bool:
        """Whether it is a matrix product of each pixel's channels, and nothing else."""
        size = (self.kernel_size, self.stride, self.padding, self.groups)
        return size == ((1, 1), (1, 1), (0, 0), 1)


@dataclass(eq=False)
class Overlay:
    """What a quantised layer makes of its own weight W at every reading: gain ⊙ W + dense + B A.

    W is a matrix [out, in], a convolution's with the columns of its codes. A recording of the layer
    reads these tensors where they are: their values may change in place, they themselves may not.
    """

    b: Tensor
    """[out, rank], in the layer's precision."""
    a: Tensor
    """[rank, in], in the layer's precision."""
    gain: Tensor | None = None
    """[out, 1] in float32, as its rounding would be that of whole rows; ``None``: one."""
    dense: Tensor | None = None
    """[out, in], in the layer's precision; ``None``: zero."""

    def apply_(self, rows: Tensor) -> None:
        """Lay it over W, in place."""
        if self.gain is not None:
            rows.mul_(self.gain)
        if self.dense is not None:
            rows.add_(self.dense)
        if len(self.a):
            rows.addmm_(self.b, self.a)


class Quantised(nn.Module):
    """A frozen layer that stores codes and scales; its ``weight`` is restored at every reading.

    A convolution's codes are in the order [out, kernel, kernel, in], so that the weight comes out
    as channels_last without a copy.
    """

    codes: Tensor
    scales: Tensor
    format: str
    shape: torch.Size
    dtype: torch.dtype
    overlay: Overlay | None = None
    """What merged adapters make of the weight; ``None``: nothing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantised":
        """Move the overlay along with the codes; what ``to`` calls."""
        super()._apply(fn, recurse)
        if self.overlay is not None:
            tensors = vars(self.overlay).items()
            self.overlay = replace(self.overlay, **{n: fn(t) for n, t in tensors if t is not None})
        return self

    def store(self, weight: Tensor, format: str, dtype: torch.dtype) -> None:  # noqa: A002
        """Quantise a weight, on its device; it reads as ``dtype`` afterwards."""
        rows = weight.detach() if weight.dim() == 2 else weight.detach().permute(0, 2, 3, 1)
        self.format, self.shape, self.dtype = format, rows.shape, dtype
        codes, scales = FORMATS[format].quantise(rows.contiguous())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def own_weight(self) -> Tensor:
        """The weight without an overlay, made anew."""
        return self._restored(None)

    @property
    def weight(self) -> Tensor:
        """The weight as the layer computes with it, made anew."""
        return self._restored(self.overlay)

    def _restored(self, overlay: Overlay | None) -> Tensor:
        rows = FORMATS[self.format].restore(self.codes, self.scales, self.shape, self.dtype)
        if overlay is not None:
            overlay.apply_(rows.view(len(rows), -1))
        return rows if rows.dim() == 2 else rows.permute(0, 3, 1, 2)


class QuantisedLinear(Quantised, FrozenLinear):  # type: ignore[override]  # the weight is read-only
    """A frozen Linear with a quantised weight."""


class QuantisedConv2d(Quantised, FrozenConv2d):  # type: ignore[override]  # the weight is read-only
    """A frozen Conv2d with a quantised weight."""


FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FrozenLinear,
    nn.Conv2d: FrozenConv2d,
}
QUANTISED: dict[type[nn.Module], type[Quantised]] = {
    FrozenLinear: QuantisedLinear,
    FrozenConv2d: QuantisedConv2d,
}


def freeze(model: nn.Module) -> None:
    """Make every Linear and Conv2d of a model a frozen one, in place."""
    model.requires_grad_(False)
    for layer in model.modules():
        if type(layer) in FROZEN:
            layer.__class__ = FROZEN[type(layer)]


def quantisable(model: nn.Module) -> list[str]:
    """The names of the frozen layers that a quantised base quantises."""
    return [
        name
        for name, layer in model.named_modules()
        if type(layer) in QUANTISED and not name.startswith(UNQUANTISED)
    ]


def quantise(layer: nn.Module, weight: Tensor, format: str, dtype: torch.dtype) -> None:  # noqa: A002
    """Make a frozen layer a quantised one that stores ``weight``."""
    del layer.weight  # the parameter, which a property replaces
    layer.__class__ = QUANTISED[type(layer)]
    assert isinstance(layer, Quantised)
    layer.store(weight, format, dtype)
