"""A check that every trainable tensor receives a gradient, without which it never changes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.errors import UserError, listed
from finetune.step.flat_weights import FlatWeights
from finetune.step.optimizers import BLOCK

CHANCES = 2
"""The steps in which each tensor can get a gradient before the lack of one is an error."""

UNLUCKY = 1e-9
"""The probability below which dropout no longer explains the lack of a gradient."""


class GradientWatch:
    """A record of the tensors that have received a finite, non-zero gradient.

    It is kept on the device, so that no step waits for it; only :meth:`check` waits, until all have
    received one. LoRA's A has no gradient while B is zero, so chances count from the first update
    at a rate above zero.

    Args:
        weights: the tensors.
        dropout: the probability with which a step drops parts of the adapter.
    """

    def __init__(self, weights: FlatWeights, dropout: float) -> None:
        self.names = list(weights.parameters)
        lengths = torch.tensor(weights.lengths) // BLOCK
        owners = torch.arange(len(lengths)).repeat_interleave(lengths)
        self._owners = owners.to(weights.values.device)
        """The tensor that each block of the gradient belongs to."""
        self.received = torch.zeros(len(lengths), dtype=torch.bool, device=weights.values.device)
        self.needed = max(CHANCES, math.ceil(math.log(UNLUCKY, dropout)) if dropout else 0)
        self.chances = 0
        self.moved = False
        """True once an update has moved the weights."""
        self.complete = False
        """True once every tensor is known to have received a gradient."""

    def observe(self, gradient: Tensor, rate: float) -> None:
        """Note the tensors that a step's gradient reaches, before the update.

        Args:
            gradient: the gradient of all tensors, as one flat vector.
            rate: the learning rate of the update.
        """
        self.chances += self.moved
        self.moved |= rate > 0
        if self.complete:
            return
        largest = gradient.view(-1, BLOCK).abs().amax(1)  # keeps NaN
        finite, some = largest.isfinite(), largest > 0
        self.received |= self._count(some).bool() & ~self._count(~finite).bool()

    def _count(self, blocks: Tensor) -> Tensor:
        """Count the true blocks of each tensor."""
        counts = torch.zeros(len(self.names), dtype=torch.int32, device=blocks.device)
        return counts.index_add_(0, self._owners, blocks.int())

    def check(self) -> None:
        """Raise a UserError that names the tensors without a gradient after all their chances."""
        if self.complete or self.chances < self.needed:
            return
        without = [n for n, got in zip(self.names, self.received.tolist(), strict=True) if not got]
        self.complete = not without
        if without:
            raise UserError(
                f"{len(without)} of {len(self.names)} trainable tensors have received no finite"
                f" gradient in {self.chances} steps: {listed(without)}. They would be exported"
                " unchanged, so the run stops; leave their modules out of adapter.targets, and"
                " please report the base and the recipe."
            )

    def state(self) -> dict[str, Any]:
        """Return the watch's part of a checkpoint."""
        return {"received": self.received, "chances": self.chances, "moved": self.moved}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same recipe."""
        self.received.copy_(state["received"])
        self.chances, self.moved = state["chances"], state["moved"]
