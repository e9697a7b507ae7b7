"""Means with confidence intervals, by the bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
"""The number of resampled means of an interval."""

CONFIDENCE = 0.95
"""The share of intervals that should hold the true mean."""


@dataclass(frozen=True)
class Score:
    """A score with its confidence interval."""

    value: float
    low: float | None
    """The interval's lower end; ``None``: there are too few pictures for an interval."""
    high: float | None
    """Its upper end."""
    count: int
    """The number of values that the score is the mean of."""

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.3f}{interval}"


def summarize(values: Sequence[float], groups: Sequence[int], seed: int = 0) -> Score | None:
    """Average values, with a percentile bootstrap interval of :data:`CONFIDENCE`.

    Whole groups are resampled, as pictures of one prompt are alike; with a single group, its values
    are. The interval says how the mean would vary with other prompts of the kind, but not with
    other training pictures or another training run. With few groups it is somewhat narrow.

    Args:
        values: one for each picture; those that are not a number are left out.
        groups: the prompt's number of each picture.
        seed: the seed of the resampling.

    Returns:
        The mean; ``None`` if there are no values.
    """
    known = [(value, group) for value, group in zip(values, groups, strict=True) if value == value]
    if not known:
        return None
    numbers, names = (np.array(column, dtype=float) for column in zip(*known, strict=True))
    mean = math.fsum(numbers) / len(numbers)
    _, group = np.unique(names, return_inverse=True)
    if group.max() == 0:
        group = np.arange(len(numbers))
    sums, counts = np.bincount(group, numbers), np.bincount(group)
    if len(sums) < 2:
        return Score(mean, None, None, len(numbers))
    drawn = np.random.default_rng(seed).multinomial(
        len(sums), np.full(len(sums), 1 / len(sums)), RESAMPLES
    )
    means = (drawn @ sums) / (drawn @ counts)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Score(mean, float(low), float(high), len(numbers))
