"""Updates: the change that an adapter makes to one weight, and the weighted sum of several.

Here a weight [out, in, ...] is a matrix W [out, in]; a convolution's columns are in the order of
its memory. Adapters with factors c turn it into

    W + Σ c (W merged - W)

where W merged is the base's own W with one adapter merged as PEFT does. All sums are in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

# rows added at once, as adding matrices of different precisions takes a copy of them
ROWS = 512


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of LoRA, rsLoRA and DoRA: W merged = gain ⊙ W + scaling B A."""

    b: Tensor
    """[out, rank]; float32 if it is merged."""
    a: Tensor
    """[rank, in], or [rank, in, ...] if it is only measured; in the precision of B."""
    scaling: float = 1.0
    gain: Tensor | None = None
    """[out, 1], float32; DoRA's magnitude divided by the norm of W + scaling B A. ``None``: 1."""

    @property
    def rank(self) -> int:
        """The rank of B A."""
        return len(self.a)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [out, in, ...] of B A."""
        return (len(self.b), *self.a.shape[1:])

    def product(self) -> Tensor:
        """Compute scaling B A, [out, in]."""
        return self.b @ self.a.flatten(1) * self.scaling

    def inner(self, other: "LowRank") -> Tensor:
        """Compute the Frobenius inner product of two products, a scalar, without forming either.

        <B A, B' A'> = Σ (BᵀB') ⊙ (A A'ᵀ), of matrices of rank x rank.
        """
        b, a = self.b.T @ other.b, self.a.flatten(1) @ other.a.flatten(1).T
        return (b * a).sum() * (self.scaling * other.scaling)

    def add_to(self, total: Tensor | None, factor: float, device: torch.device) -> Tensor:
        """Add ``factor`` times scaling B A to a sum [out, in], in place; ``None``: zero."""
        b, a = self.b.to(device), self.a.to(device)
        if total is None:
            nothing = b.new_empty(()).expand(len(b), a.shape[1])
            return torch.addmm(nothing, b, a, beta=0, alpha=factor * self.scaling)
        return total.addmm_(b, a, alpha=factor * self.scaling)


@dataclass(frozen=True, eq=False)
class Dense:
    """The update W merged - W of any kind."""

    matrix: Tensor
    """[out, in], float32, in main memory."""

    def add_to(self, total: Tensor | None, factor: float, device: torch.device) -> Tensor:
        """Add ``factor`` times the matrix to a sum [out, in], in place; ``None``: zero."""
        matrix = self.matrix.to(device)
        return matrix * factor if total is None else total.add_(matrix, alpha=factor)


Update: TypeAlias = LowRank | Dense


class Term(NamedTuple):
    """One adapter's contribution to a weight."""

    factor: float
    update: Update


Terms: TypeAlias = tuple[Term, ...]
"""The adapters that are switched on, in an order that does not depend on when they were added."""


def as_matrix(weight: Tensor) -> Tensor:
    """View a weight [out, in, ...] as the matrix [out, in] that shares its memory."""
    return in_order_of(weight, weight).view(len(weight), -1)


def in_shape_of(weight: Tensor, matrix: Tensor) -> Tensor:
    """View a matrix from :func:`as_matrix` in the shape of its weight."""
    shape = in_order_of(weight, weight).shape
    return matrix.view(shape) if weight.is_contiguous() else matrix.view(shape).permute(0, 3, 1, 2)


def in_order_of(weight: Tensor, tensor: Tensor) -> Tensor:
    """View a tensor [n, in, ...] with its dimensions in the order of a weight's memory."""
    return tensor if weight.is_contiguous() else tensor.permute(0, 2, 3, 1)


def low_rank(
    weight: Tensor, b: Tensor, a: Tensor, scaling: float, magnitude: Tensor | None
) -> LowRank:
    """Build the update of a weight [out, in, ...], on its device, in float32, from LoRA's factors.

    B is [out, rank] or [out, rank, 1, 1], and A [rank, in, ...]. The gain of a DoRA, whose
    magnitude has ``out`` values, is that of PEFT's ``merge``, equation 5 of arXiv 2402.09353.
    """
    device = weight.device
    columns = in_order_of(weight, a).flatten(1).to(device, torch.float32)
    rows = b.flatten(1).to(device, torch.float32)
    plain = LowRank(rows, columns, scaling)
    if magnitude is None:
        return plain
    merged = plain.add_to(None, 1.0, device).add_(as_matrix(weight))
    norm = torch.linalg.norm(merged, dim=1, keepdim=True)
    gain = magnitude.to(device, torch.float32).view(-1, 1) / norm
    return LowRank(rows * gain, columns, scaling, gain)


def change(terms: Sequence[Term], device: torch.device) -> Tensor | None:
    """Sum what terms add to the (scaled) W, [out, in] in float32; ``None``: nothing."""
    total = None
    for factor, update in terms:
        total = update.add_to(total, factor, device)
    return total


def gain(terms: Sequence[Term], device: torch.device) -> Tensor | None:
    """Sum what terms multiply W by, [out, 1] in float32; ``None``: 1."""
    gains = [
        (factor, update.gain)
        for factor, update in terms
        if isinstance(update, LowRank) and update.gain is not None
    ]
    if not gains:
        return None
    total = torch.zeros((), device=device) + (1 - sum(factor for factor, _ in gains))
    for factor, scale in gains:
        total = total + factor * scale.to(device)
    return total


def merge(base: Tensor, terms: Sequence[Term], out: Tensor | None = None) -> Tensor:
    """Merge terms into the base's own W.

    Args:
        base: W, [out, in] in the base's precision.
        terms: at least one.
        out: the result, [out, in], rounded to its precision once; ``None``: a new one in float32.
    """
    added = change(terms, base.device)
    assert added is not None
    scale = gain(terms, base.device)
    scaled = base if scale is None else base * scale
    result = added if out is None else out
    for place, *parts in zip(*(each.split(ROWS) for each in (result, scaled, added)), strict=True):
        torch.add(*parts, out=place)
    return result


def delta(weight: Tensor, update: Update) -> Tensor:
    """Compute what an update adds to the base's own weight, in its shape and float32."""
    terms = [Term(1.0, update)]
    added, scale = change(terms, weight.device), gain(terms, weight.device)
    assert added is not None
    if scale is not None:
        added += (scale - 1) * as_matrix(weight)
    return in_shape_of(weight, added)
