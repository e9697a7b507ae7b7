"""The adapter's weights as one flat vector, so that an operation on all of them is one kernel."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.step.optimizers import BLOCK, SMALL, Slice


class FlatWeights:
    """An adapter's weights and their gradient, each as one float32 vector.

    The UNet's parameters are views of ``values`` or, if they train in another precision, of a copy
    that :meth:`publish` brings up to date: updates add up in float32, so that small ones are not
    lost to rounding (Mixed Precision Training, arXiv 1710.03740).

    Every tensor starts a :data:`BLOCK` of its own: in a block with two tensors, the larger
    gradients of one would drown those of the other.

    Args:
        parameters: the parameters by name, reordered so that every :class:`Slice` is one piece.
        dtype: the precision in which the UNet trains them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        self.parameters = dict(sorted(parameters.items(), key=lambda item: _kind(*item)))
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.lengths = [-(-size // BLOCK) * BLOCK for size in sizes]
        """The length of each tensor in the vector, including the padding of its last block."""
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
        """View a flat vector as tensors with the names and shapes of the parameters."""
        return {
            name: part[: parameter.numel()].view(parameter.shape)
            for (name, parameter), part in zip(
                self.parameters.items(), flat.split(self.lengths), strict=True
            )
        }

    def slices(self, *, whole_tensors: bool) -> list[Slice]:
        """Divide the values into as few pieces as an optimizer can treat alike.

        Args:
            whole_tensors: make each tensor its own piece.
        """
        kinds = [_kind(*item) for item in self.parameters.items()]
        if whole_tensors:
            values, gradients = self.views(self.values), self.views(self.gradient)
            pieces = zip(values.values(), gradients.values(), kinds, strict=True)
        else:
            lengths = dict.fromkeys(kinds, 0)
            for kind, length in zip(kinds, self.lengths, strict=True):
                lengths[kind] += length
            sizes = list(lengths.values())
            pieces = zip(self.values.split(sizes), self.gradient.split(sizes), lengths, strict=True)
        slices = []
        for part, gradient, (fast, small) in pieces:
            parameter = nn.Parameter(part)
            parameter.grad = gradient
            slices.append(Slice(parameter, fast, small))
        return slices

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
    def use(self, values: Tensor) -> Iterator[None]:
        """Give the UNet float32 ``values`` while the ``with`` block runs."""
        self._point_at(values)
        try:
            yield
        finally:
            self._point_at(self.working)

    def _point_at(self, flat: Tensor) -> None:
        for name, view in self.views(flat).items():
            self.parameters[name].data = view


def _kind(name: str, parameter: nn.Parameter) -> tuple[bool, bool]:
    """Tell ``fast`` and ``small`` of a :class:`Slice`; B matrices are known by PEFT's name."""
    return ".lora_B." in name, parameter.numel() < SMALL
