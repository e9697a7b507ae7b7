"""The adapter's weights as one flat vector: an operation on all of them is one kernel."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 2**8
"""Values that share a scale in bitsandbytes' 8-bit states. Every tensor starts a block of its own:
in a block of two tensors, the larger gradients of one would drown those of the other."""

SMALL = 2**12
"""Tensors of fewer values keep their state in 32 bits, as bitsandbytes keeps it by default."""


class Kind(NamedTuple):
    """What an optimizer must know of a tensor."""

    fast: bool
    """Whether LoRA+ teaches it faster: it is one of the B matrices."""
    small: bool
    """Whether it is too small for a state in 8 bits."""


@dataclass(frozen=True)
class Slice:
    """A part of the flat vector that an optimizer updates as one tensor."""

    parameter: nn.Parameter
    """A view of the values; its gradient is the same view of the gradient."""
    kind: Kind
    """The kind of all tensors in it."""


class FlatWeights:
    """An adapter's weights and their gradient, each one float32 vector.

    The UNet's parameters are views: of ``values`` themselves, or, in training with another
    precision, of a copy that :meth:`publish` brings up to date. Small updates are then not lost to
    rounding, as they add up in float32 (Mixed Precision Training, arXiv 1710.03740).

    Args:
        parameters: by name; kept in an order in which every :class:`Slice` is one piece.
        dtype: the precision that the UNet trains them in.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        self.parameters = dict(sorted(parameters.items(), key=_kind_of))
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.lengths = [-(-size // BLOCK) * BLOCK for size in sizes]
        """Values of each tensor, those that fill up its last block included."""
        self.values = torch.cat(
            [
                F.pad(parameter.detach().float().flatten(), (0, length - parameter.numel()))
                for parameter, length in zip(self.parameters.values(), self.lengths, strict=True)
            ]
        )
        self.gradient = torch.zeros_like(self.values)
        same = dtype == torch.float32
        self.working = self.values if same else self.values.to(dtype)
        self.working_gradient = self.gradient if same else self.gradient.to(dtype)
        self._point_at(self.working)
        gradients = self.views(self.working_gradient)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat vector by the names and shapes of the parameters."""
        return {
            name: part[: parameter.numel()].view(parameter.shape)
            for (name, parameter), part in zip(
                self.parameters.items(), flat.split(self.lengths), strict=True
            )
        }

    def slices(self, *, whole_tensors: bool) -> list[Slice]:
        """Divide the values for an optimizer, in as few pieces as it can treat alike.

        Args:
            whole_tensors: whether the optimizer needs every tensor by itself.
        """
        if whole_tensors:
            values, gradients = self.views(self.values), self.views(self.gradient)
            kinds = map(_kind_of, self.parameters.items())
            return list(map(_slice, values.values(), gradients.values(), kinds))
        lengths: dict[Kind, int] = {}
        for item, length in zip(self.parameters.items(), self.lengths, strict=True):
            lengths[_kind_of(item)] = lengths.get(_kind_of(item), 0) + length
        pieces = (flat.split(list(lengths.values())) for flat in (self.values, self.gradient))
        return list(map(_slice, *pieces, lengths))

    def collect(self) -> None:
        """Add the gradients of the UNet's parameters to ``gradient``."""
        if self.working_gradient is not self.gradient:
            self.gradient += self.working_gradient
            self.working_gradient.zero_()

    def publish(self) -> None:
        """Give the UNet's parameters the current values."""
        if self.working is not self.values:
            self.working.copy_(self.values)

    @contextmanager
    def shown(self, values: Tensor) -> Iterator[None]:
        """The UNet with these values, in float32."""
        self._point_at(values)
        yield
        self._point_at(self.working)

    def _point_at(self, flat: Tensor) -> None:
        for name, view in self.views(flat).items():
            self.parameters[name].data = view


def _kind_of(item: tuple[str, nn.Parameter]) -> Kind:
    name, parameter = item
    return Kind(fast=".lora_B." in name, small=parameter.numel() < SMALL)


def _slice(values: Tensor, gradient: Tensor, kind: Kind) -> Slice:
    parameter = nn.Parameter(values)
    parameter.grad = gradient
    return Slice(parameter, kind)
