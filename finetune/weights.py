"""The adapter's weights as one flat vector: an operation on all of them is one kernel."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class FlatWeights:
    """An adapter's weights and their gradient, each one float32 vector.

    The UNet's parameters are views: of ``values`` themselves, or, in training with another
    precision, of a copy that :meth:`publish` brings up to date. Small updates are then not lost to
    rounding, as they add up in float32 (Mixed Precision Training, arXiv 1710.03740).

    Args:
        parameters: by name; the B matrices of LoRA+ are put last, so that they are one slice.
        dtype: the precision that the UNet trains them in.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        self.parameters = dict(sorted(parameters.items(), key=lambda item: is_fast(item[0])))
        flat = [parameter.detach().float().flatten() for parameter in self.parameters.values()]
        self.values = torch.cat(flat)
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
        parts = torch.split(flat, [parameter.numel() for parameter in self.parameters.values()])
        return {
            name: part.view(parameter.shape)
            for (name, parameter), part in zip(self.parameters.items(), parts, strict=True)
        }

    def slices(self, *, whole_tensors: bool) -> dict[str, nn.Parameter]:
        """What an optimizer is given: all slow and all fast values, or every tensor by itself."""
        values, gradients = self.views(self.values), self.views(self.gradient)
        if not whole_tensors:
            slow = sum(v.numel() for name, v in values.items() if not is_fast(name))
            cuts = {"slow": slice(slow), "fast.lora_B.": slice(slow, None)}
            values = {name: self.values[cut] for name, cut in cuts.items()}
            gradients = {name: self.gradient[cut] for name, cut in cuts.items()}
        slices = {name: nn.Parameter(value) for name, value in values.items() if value.numel()}
        for name, parameter in slices.items():
            parameter.grad = gradients[name]
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
    def shown(self, values: Tensor) -> Iterator[None]:
        """The UNet with these values, in float32."""
        self._point_at(values)
        yield
        self._point_at(self.working)

    def _point_at(self, flat: Tensor) -> None:
        for name, view in self.views(flat).items():
            self.parameters[name].data = view


def is_fast(name: str) -> bool:
    """Whether a parameter is one of the B matrices, which LoRA+ teaches faster."""
    return ".lora_B." in name
