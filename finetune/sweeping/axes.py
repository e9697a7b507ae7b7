"""The fields that a sweep varies: their values, all combinations of them, and random ones."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from adapters.arguments import LARGEST
from adapters.errors import UserError, closest

Combination: TypeAlias = tuple[str, ...]
"""A value of each axis, as it would stand behind ``key=`` on the command line."""

ATTEMPTS = 100
"""The number of draws in a row, for each combination so far, that all repeat one of them before the
axes count as exhausted."""

DIGITS = 3
"""The significant digits of a number drawn from a range, so that it can be read and typed."""

FARTHEST: Mapping[type, float] = {int: 2**63 - 1, float: LARGEST}
"""The largest absolute values of a range's ends: what NumPy draws, and what float32 holds."""

SET_BY_THE_SWEEP = {
    "name": "each run is named after its values",
    "runs_dir": "all runs are in the sweep's folder",
    "seed": "name the seeds of training in seeds, over which scores are averaged",
}
"""Keys of a recipe that are no axes, with the reason."""


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

    def draw(self, rng: np.random.Generator) -> str:
        """Draw one of the values."""
        return self.values[rng.integers(len(self.values))]


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


Axis: TypeAlias = Choices | Range


def read_axis(key: str, values: Any) -> Axis:
    """Read an axis from a sweep's ``over`` section.

    Args:
        key: the dotted key of a field, or several with commas between them.
        values: a list of values, or a range: ``{low: …, high: …}`` with ``log: true`` if wanted.

    Raises:
        UserError: if a key is one that the sweep sets, or the values are neither.
    """
    keys = tuple(part.strip() for part in key.split(","))
    for each in keys:
        if reason := SET_BY_THE_SWEEP.get(each):
            raise UserError(f"{each} cannot be varied: {reason}")
    if isinstance(values, Mapping):
        return _read_range(keys, values)
    if not isinstance(values, list) or not values:
        raise UserError(
            f"{key} must be a list of values, or a range as in {{low: 1e-4, high: 1e-2, log: true}}"
            f" (got {values!r})"
        )
    return Choices(keys, tuple(dict.fromkeys(map(_as_text, values))))


def _read_range(keys: tuple[str, ...], values: Mapping[str, Any]) -> Range:
    """Read a range, and check its ends."""
    name, names = ", ".join(keys), ("low", "high", "log")
    for unknown in values.keys() - set(names):
        raise UserError(f"{name} has the unknown key {unknown!r}; {closest(str(unknown), names)}")
    low, high = (_read_end(name, end, values.get(end)) for end in ("low", "high"))
    log = values.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{name}: log must be true or false (got {log!r})")
    if not low < high:
        raise UserError(f"{name}: low must be less than high (got {low} and {high})")
    if log and low <= 0:
        raise UserError(f"{name}: low must be above 0 with log: true (got {low})")
    whole = isinstance(low, int) and isinstance(high, int)
    return Range(keys, low, high, log, whole)


def _read_end(name: str, end: str, value: Any) -> float:
    """Read an end of a range."""
    farthest = FARTHEST.get(type(value))  # of none but numbers: a bool is of a type of its own
    if farthest is None or not abs(value) <= farthest:  # nor is nan
        most = "" if farthest is None else f" from {-farthest:.3g} to {farthest:.3g}"
        raise UserError(f"{name}: {end} must be a number{most} (got {value!r})")
    number: float = value
    return number


def _as_text(value: Any) -> str:
    """Write a value as it would stand in an override; JSON is YAML too."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def expand_grid(axes: Sequence[Choices]) -> list[Combination]:
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
    return [f"{key}={value}" for axis, value in zip(axes, values, strict=True) for key in axis.keys]
