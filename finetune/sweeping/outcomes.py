"""The outcomes of a sweep: the scores of each combination and scale, over its runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, TypeAlias

from finetune.sweeping.front import find_front
from finetune.sweeping.names import name_variant
from finetune.sweeping.points import Trial
from finetune.sweeping.progress import read_seconds
from finetune.sweeping.scoring import BASE
from finetune.sweeping.work import Result

Figures: TypeAlias = Mapping[str, float | None]
"""Scores by name, with ``fidelity`` and ``preservation``; ``None``: not defined."""

KEEP_OTHERS = 0.9
"""The preservation that a recommended combination has at least, unless told otherwise."""


@dataclass(frozen=True)
class Spread:
    """The mean of a figure over some runs, and how far they lie apart."""

    mean: float
    low: float
    high: float
    error: float | None
    """The standard error of the mean; ``None`` of a single run."""
    count: int
    """The number of runs."""

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """Compute the spread of the values that are defined; ``None`` if none is."""
        defined = [value for value in values if value is not None and math.isfinite(value)]
        if not defined:
            return None
        count = len(defined)
        error = stdev(defined) / math.sqrt(count) if count > 1 else None
        return cls(fmean(defined), min(defined), max(defined), error, count)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


def spread_each(figures: Sequence[Figures]) -> dict[str, Spread | None]:
    """Compute the spread of each figure that one of some runs has."""
    names = dict.fromkeys(name for each in figures for name in each)
    return {name: Spread.of([each.get(name) for each in figures]) for name in names}


@dataclass(frozen=True)
class Outcome:
    """A combination of values at one adapter scale, over its runs."""

    settings: Mapping[str, str]
    """The values that the sweep compares, by short name."""
    scale: float
    """The adapter scale; 0 is the base."""
    runs: tuple[Result, ...]
    """Its scored runs: one for each seed, and each value that the sweep averages across."""
    variant: str
    """The variant of the runs' scores."""

    @cached_property
    def figures(self) -> tuple[Figures, ...]:
        """The figures of each run."""
        return tuple(compute_figures(run.scores, self.variant) for run in self.runs)

    @cached_property
    def seconds(self) -> Spread | None:
        """The time that a training took."""
        return Spread.of([read_seconds(run.point.recipe) for run in self.runs])

    @cached_property
    def scores(self) -> Mapping[str, Spread | None]:
        """Each score over all runs, by name."""
        return spread_each(self.figures)

    @property
    def name(self) -> str:
        """The name of the combination and its scale, as in ``rank-8=0.7``."""
        return f"{self.runs[0].point.combination}={self.variant}"

    @property
    def trials(self) -> dict[Trial, Figures]:
        """The figures of each run, by what it has in common with runs of other combinations."""
        pairs = zip(self.runs, self.figures, strict=True)
        return {run.point.trial: figures for run, figures in pairs}

    def select(self, axis: str, value: str) -> "Outcome":
        """Select the runs with one of the values that the sweep averages across."""
        runs = tuple(run for run in self.runs if run.point.across[axis] == value)
        return replace(self, runs=runs)

    @property
    def place(self) -> tuple[float | None, float | None]:
        """Fidelity and preservation, the means over the runs."""
        spreads = (self.scores.get("fidelity"), self.scores.get("preservation"))
        fidelity, preservation = (None if s is None else s.mean for s in spreads)
        return fidelity, preservation


@dataclass(frozen=True)
class Outcomes:
    """All outcomes of a sweep so far."""

    rows: tuple[Outcome, ...]
    """By combination, then by scale."""
    front: tuple[int, ...]
    """The rows on the Pareto front, the highest fidelity first."""
    failures: tuple[Result, ...]
    """The runs that failed."""
    total: int
    """The number of runs that the sweep has."""
    reference: int | None = None
    """The row that others are compared with; ``None``: it has not been scored yet."""
    keep_others: float = KEEP_OTHERS
    """The preservation that a recommended row has at least."""

    @property
    def is_complete(self) -> bool:
        """True once every run is scored or has failed."""
        done = {run.point.name for row in self.rows for run in row.runs}
        return len(done) + len(self.failures) == self.total

    @property
    def across(self) -> dict[str, list[str]]:
        """The values that the sweep averages across, of the runs so far, by short name."""
        found: dict[str, dict[str, None]] = {}
        for row in self.rows:
            for run in row.runs:
                for axis, value in run.point.across.items():
                    found.setdefault(axis, {})[value] = None
        return {axis: list(values) for axis, values in found.items()}

    def base(self) -> Outcome:
        """Return the base's outcome, over all runs, as each subject has a base score of its own."""
        runs = {run.point.name: run for row in self.rows for run in row.runs}
        return Outcome({}, 0.0, tuple(runs.values()), BASE)


def collect_outcomes(
    results: Sequence[Result],
    scales: Sequence[float],
    total: int,
    reference: str | None = None,
    keep_others: float = KEEP_OTHERS,
) -> Outcomes:
    """Collect what the finished runs score.

    Args:
        results: the runs so far.
        scales: the adapter scales that they are scored at.
        total: the number of all runs.
        reference: the :attr:`Outcome.name` of the row that others are compared with.
        keep_others: see :class:`Outcomes`.
    """
    combinations: dict[str, list[Result]] = {}
    for result in results:
        if result.failure is None:
            combinations.setdefault(result.point.combination, []).append(result)
    rows = tuple(
        Outcome(
            settings=runs[0].point.settings,
            scale=scale,
            runs=tuple(runs),
            variant=name_variant(scale),
        )
        for runs in combinations.values()
        for scale in scales
    )
    names = [row.name for row in rows]
    return Outcomes(
        rows,
        tuple(find_front([row.place for row in rows])),
        tuple(result for result in results if result.failure is not None),
        total,
        names.index(reference) if reference in names else None,
        keep_others,
    )


def compute_figures(scores: Mapping[str, Any], variant: str) -> dict[str, float | None]:
    """Compute the figures of a variant in a run's scores.

    Besides the scores themselves these are ``fidelity``, CLIP-I as a part of its ceiling (CLIP-I
    itself where no ceiling is known), and ``preservation``, the CLIP-T of other things as a part of
    the base's: 1 is nothing forgotten.
    """
    variants = scores["variants"]
    own = {name: (entry or {}).get("value") for name, entry in variants[variant].items()}

    def value(entries: Mapping[str, Any], name: str) -> float | None:
        return (entries.get(name) or {}).get("value")

    ceiling = value(scores["ceiling"], "clip_i")
    fidelity = own.get("clip_i")
    if ceiling is not None:
        fidelity = _divide(fidelity, ceiling)
    preservation = _divide(own.get("clip_t_others"), value(variants[BASE], "clip_t_others"))
    return {"fidelity": fidelity, "preservation": preservation, **own}


def _divide(part: float | None, whole: float | None) -> float | None:
    """Divide scores; ``None`` if one is undefined or the whole is not above 0."""
    return None if part is None or whole is None or not whole > 0 else part / whole
