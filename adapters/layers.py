"""Layers whose weights take adapters in place, so that what was recorded of them stays valid.

A layer in full precision is written over: with what terms make of the base's own weight, of which
a copy is kept. A quantised layer keeps its codes and needs no copy: terms are laid over the weight
that it restores at every reading, from tensors at addresses that stay. Their factors are rounded to
the layer's precision, and cost one or two more passes over the weight at each reading, even while
they are switched off.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from adapters.updates import Dense, LowRank, Term, as_matrix, change, gain, merge
from unets.frozen import Overlay, Quantised

RANK_STEP = 8
"""Ranks of overlays are multiples of this, as matrix units ask for; what terms leave is zero."""


class Layer(Protocol):
    """A layer of a UNet that adapters change."""

    @property
    def base(self) -> Tensor:
        """The base's own weight, [out, in, ...], on the layer's device."""

    def write(self, terms: Sequence[Term]) -> bool:
        """Have the weight be what terms make of the base's own; of none, that itself, to the bit.

        Returns:
            Whether recordings that read the weight have to be made anew.
        """

    def release(self) -> bool:
        """Leave the layer as it was before any adapter; returned is as in ``write``."""


@dataclass
class Plain:
    """A layer in full precision; its weight is written over, never replaced."""

    module: nn.Linear | nn.Conv2d
    kept_on: torch.device | None
    """Where the base's own weight is kept; ``None``: beside the layer's."""
    own: Tensor = field(init=False)

    def __post_init__(self) -> None:
        weight = self.module.weight.detach()
        self.own = weight.to(self.kept_on or weight.device, copy=True)
        if weight.is_cuda and not self.own.is_cuda:
            self.own = self.own.pin_memory()

    @property
    def base(self) -> Tensor:
        """The copy, brought to the layer's device where it is kept elsewhere."""
        return self.own.to(self.module.weight.device, non_blocking=True)

    def write(self, terms: Sequence[Term]) -> bool:
        """Write over the weight; recordings read it where it is."""
        weight = self.module.weight.detach()
        assert weight.is_contiguous() == self.own.is_contiguous(), "the order of columns changed"
        if terms:
            merge(as_matrix(self.base), terms, out=as_matrix(weight))
        else:
            weight.copy_(self.own, non_blocking=True)
        return False

    def release(self) -> bool:
        """Nothing is left to do."""
        return False


@dataclass
class Coded:
    """A quantised layer; its overlay only grows, until the last adapter of the layer is removed.

    Recordings have to be made anew then, and where the overlay grows: for terms that have together
    a larger rank than any before, are the first ones of DoRA, or the first ones without factors.
    """

    module: Quantised

    @property
    def base(self) -> Tensor:
        """The restored weight, without the overlay."""
        return self.module.own_weight

    def write(self, terms: Sequence[Term]) -> bool:
        """Write over the overlay, on a larger one where it is too small."""
        before = self.module.overlay
        if before is None and not terms:
            return False
        overlay = self._large_enough(before, terms)
        _fill(overlay, terms)
        self.module.overlay = overlay
        return overlay is not before

    def release(self) -> bool:
        """Drop the overlay."""
        overlay, self.module.overlay = self.module.overlay, None
        return overlay is not None

    def _large_enough(self, overlay: Overlay | None, terms: Sequence[Term]) -> Overlay:
        low = [update for _, update in terms if isinstance(update, LowRank)]
        rank = sum(update.rank for update in low)
        scaled = any(update.gain is not None for update in low)
        dense = len(low) < len(terms)
        if overlay is not None:
            scaled |= overlay.gain is not None
            dense |= overlay.dense is not None
            present = (overlay.gain is not None, overlay.dense is not None)
            if rank <= len(overlay.a) and present == (scaled, dense):
                return overlay
            rank = max(rank, len(overlay.a))
        rank = -(-rank // RANK_STEP) * RANK_STEP
        layer, codes = self.module, self.module.codes
        rows, columns = layer.shape[0], layer.shape[1:].numel()
        return Overlay(
            b=codes.new_empty(rows, rank, dtype=layer.dtype),
            a=codes.new_empty(rank, columns, dtype=layer.dtype),
            gain=codes.new_empty(rows, 1, dtype=torch.float32) if scaled else None,
            dense=codes.new_empty(rows, columns, dtype=layer.dtype) if dense else None,
        )


def _fill(overlay: Overlay, terms: Sequence[Term]) -> None:
    """Write terms into an overlay that is large enough for them."""
    device = overlay.b.device
    start = 0
    for factor, update in terms:
        if isinstance(update, LowRank):
            part = slice(start, start + update.rank)
            torch.mul(update.b.to(device), factor * update.scaling, out=overlay.b[:, part])
            overlay.a[part] = update.a
            start = part.stop
    overlay.b[:, start:].zero_()
    overlay.a[start:].zero_()
    if overlay.gain is not None:
        scale = gain(terms, device)
        overlay.gain.copy_(torch.ones(()) if scale is None else scale)
    if overlay.dense is not None:
        added = change([term for term in terms if isinstance(term.update, Dense)], device)
        overlay.dense.copy_(torch.zeros(()) if added is None else added)
