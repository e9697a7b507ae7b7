"""The fields that a sweep varies: their values, all combinations of them, and random ones."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from adapters.errors import UserError

Combination: TypeAlias = tuple[str, ...]
"""A value of each axis, as it would stand behind ``key=`` on the command line."""

ATTEMPTS = 100
"""The number of draws in a row, for each combination so far, that all repeat one of them before the
axes count as exhausted."""

DIGITS = 3
"""The significant digits of a number drawn from a range, so that it can be read and typed."""


@dataclass(frozen=True)
class Choices:
    """An axis with listed values."""

    keys: tuple[str, ...]
    """The fields that take the value: usually one, several if they vary together."""
    values: tuple[str, ...]

    @property
    def size(self) -> float:
        """The number of different values."""
        return len(self.values)

    @property
    def named_after(self) -> tuple[str, ...]:
        """The keys that its short name is made of."""
        return self.keys

    def draw(self, rng: np.random.Generator) -> str:
        """Draw one of the values."""
        return self.values[rng.integers(len(self.values))]

    def list_overrides(self, value: str) -> list[str]:
        """List a value as overrides of a recipe."""
        return [f"{key}={value}" for key in self.keys]


@dataclass(frozen=True)
class Bundles:
    """An axis with named values, each of which sets fields of its own, such as a subject's."""

    name: str
    """The axis's name, which is no key of a recipe."""
    bundles: Mapping[str, tuple[str, ...]]
    """The overrides of each value, by its name."""

    @property
    def values(self) -> tuple[str, ...]:
        """The names of the values."""
        return tuple(self.bundles)

    @property
    def keys(self) -> tuple[str, ...]:
        """The fields that some value sets."""
        overrides = itertools.chain(*self.bundles.values())
        return tuple(dict.fromkeys(override.partition("=")[0] for override in overrides))

    @property
    def size(self) -> float:
        """The number of different values."""
        return len(self.bundles)

    @property
    def named_after(self) -> tuple[str, ...]:
        """The keys that its short name is made of."""
        return (self.name,)

    def draw(self, rng: np.random.Generator) -> str:
        """Draw one of the values."""
        return self.values[rng.integers(len(self.bundles))]

    def list_overrides(self, value: str) -> list[str]:
        """List the overrides that a value stands for."""
        return list(self.bundles[value])


@dataclass(frozen=True)
class Range:
    """An axis with any value from ``low`` to ``high``, inclusive."""

    keys: tuple[str, ...]
    low: float
    high: float
    log: bool
    """Draw uniformly in the logarithm, so that each factor of ten has an equal share."""
    whole: bool
    """Draw whole numbers."""

    @property
    def size(self) -> float:
        """The largest number of different values that can be drawn."""
        return int(self.high) - int(self.low) + 1 if self.whole else math.inf

    @property
    def named_after(self) -> tuple[str, ...]:
        """The keys that its short name is made of."""
        return self.keys

    def draw(self, rng: np.random.Generator) -> str:
        """Draw a number of :data:`DIGITS` digits."""
        if self.whole and not self.log:
            return str(rng.integers(int(self.low), int(self.high) + 1))
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        value = float(f"{value:.{DIGITS}g}")
        clipped = min(max(value, self.low), self.high)  # as rounding may leave the range
        return str(round(clipped)) if self.whole else f"{clipped:g}"

    def list_overrides(self, value: str) -> list[str]:
        """List a value as overrides of a recipe."""
        return [f"{key}={value}" for key in self.keys]


Listed: TypeAlias = Choices | Bundles
"""An axis whose values can be counted out."""

Axis: TypeAlias = Listed | Range


def expand_grid(axes: Sequence[Listed]) -> list[Combination]:
    """List all combinations; the last axis changes fastest."""
    return list(itertools.product(*(axis.values for axis in axes)))


def draw_random(axes: Sequence[Axis], count: int, seed: int) -> list[Combination]:
    """Draw different combinations.

    A draw is a function of the seed and its position, so that the first of a longer search are
    those of a shorter one.

    Raises:
        UserError: if there are fewer combinations.
    """
    drawn: dict[Combination, None] = {}
    most, repeated = math.prod(axis.size for axis in axes), 0
    for position in itertools.count():
        if most < count or repeated > ATTEMPTS * len(drawn):
            break
        rng, before = np.random.default_rng([seed, position]), len(drawn)
        drawn[tuple(axis.draw(rng) for axis in axes)] = None
        repeated = repeated + 1 if len(drawn) == before else 0
        if len(drawn) == count:
            return list(drawn)
    known = most if most < count else f"about {len(drawn)}"
    raise UserError(
        f"random asks for {count} different combinations, but the axes have {known}; lower it, or"
        " leave it out to train all."
    )


def hides(later: str, earlier: str) -> bool:
    """Tell whether a dotted key that is set later undoes an earlier one: it is it or holds it."""
    return f"{earlier}.".startswith(f"{later}.")


def list_overrides(axes: Sequence[Axis], values: Combination) -> list[str]:
    """List a combination's values as overrides of a recipe."""
    pairs = zip(axes, values, strict=True)
    return [override for axis, value in pairs for override in axis.list_overrides(value)]
