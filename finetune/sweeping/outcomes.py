"""The outcomes of a sweep: the scores of each combination and scale, over its seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.sweeping.front import find_front
from finetune.sweeping.names import name_variant
from finetune.sweeping.progress import read_seconds
from finetune.sweeping.scoring import BASE
from finetune.sweeping.work import Result


@dataclass(frozen=True)
class Spread:
    """The mean of a figure over some runs, and its range."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """Compute the spread of the values that are defined; ``None`` if none is."""
        defined = [value for value in values if value is not None and math.isfinite(value)]
        if not defined:
            return None
        return cls(sum(defined) / len(defined), min(defined), max(defined))

    def __str__(self) -> str:
        text = f"{self.mean:.3f}"
        return text if self.low == self.high else f"{text} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Outcome:
    """A combination of values at one adapter scale, over its seeds."""

    settings: Mapping[str, str]
    """The values that the sweep varies, by short name."""
    scale: float
    """The adapter scale."""
    runs: tuple[Result, ...]
    """Its scored runs, one for each seed."""
    scores: Mapping[str, Spread | None]
    """Each score, by name: those of the pictures, ``fidelity`` and ``preservation``."""
    seconds: Spread | None
    """The time that a training took."""

    @property
    def place(self) -> tuple[float | None, float | None]:
        """Fidelity and preservation, the means over the seeds."""
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


def collect_outcomes(results: Sequence[Result], scales: Sequence[float], total: int) -> Outcomes:
    """Collect what the finished runs score."""
    combinations: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        if result.failure is None:
            values = tuple(result.point.settings.values())
            combinations.setdefault(values, []).append(result)
    rows = []
    for runs in combinations.values():
        seconds = Spread.of([read_seconds(run.point.recipe) for run in runs])
        for scale in scales:
            figures = [compute_figures(run.scores, name_variant(scale)) for run in runs]
            spreads = {
                name: Spread.of([each.get(name) for each in figures])
                for name in dict.fromkeys(name for each in figures for name in each)
            }
            rows.append(Outcome(runs[0].point.settings, scale, tuple(runs), spreads, seconds))
    return Outcomes(
        tuple(rows),
        tuple(find_front([row.place for row in rows])),
        tuple(result for result in results if result.failure is not None),
        total,
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


def to_json(outcomes: Outcomes) -> dict[str, Any]:
    """Write outcomes for programs."""
    return {
        "format": 1,
        "runs": outcomes.total,
        "outcomes": [
            {
                "settings": dict(row.settings),
                "scale": row.scale,
                "on_front": index in outcomes.front,
                "scores": {
                    name: None if spread is None else vars(spread)
                    for name, spread in row.scores.items()
                },
                "training_seconds": None if row.seconds is None else vars(row.seconds),
                "runs": [
                    {
                        "name": run.point.name,
                        "seed": run.point.seed,
                        "adapters": str(run.point.adapters),
                    }
                    for run in row.runs
                ],
            }
            for index, row in enumerate(outcomes.rows)
        ],
        "failures": [
            {"name": failed.point.name, "reason": failed.failure} for failed in outcomes.failures
        ],
    }
