"""A sweep's results for programs: ``results.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from finetune.sweeping.judgement import Difference, compare_all, recommend
from finetune.sweeping.outcomes import Outcome, Outcomes, Spread, compute_figures
from finetune.sweeping.scoring import BASE

FORMAT = 2
"""The version of the layout."""


def to_json(outcomes: Outcomes) -> dict[str, Any]:
    """Return all figures: by combination, by subject and by run; ``None``: not defined."""
    differences = compare_all(outcomes)
    return {
        "format": FORMAT,
        "runs": outcomes.total,
        "recommendation": recommend(outcomes),
        "reference": outcomes.reference,
        "outcomes": [
            {
                "settings": dict(row.settings),
                "scale": row.scale,
                "on_front": index in outcomes.front,
                "scores": _spreads(row.scores),
                "differences": _differences(differences.get(index, {})),
                "across": _by_value(row, outcomes.across),
                "training_seconds": None if row.seconds is None else asdict(row.seconds),
                "runs": _runs(row),
            }
            for index, row in enumerate(outcomes.rows)
        ],
        "base": _base(outcomes),
        "failures": [
            {"name": failed.point.name, "reason": failed.failure} for failed in outcomes.failures
        ],
    }


def _base(outcomes: Outcomes) -> dict[str, Any]:
    base = outcomes.base()
    return {"scores": _spreads(base.scores), "across": _by_value(base, outcomes.across)}


def _by_value(row: Outcome, across: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        axis: {value: _spreads(row.select(axis, value).scores) for value in values}
        for axis, values in across.items()
    }


def _runs(row: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "name": run.point.name,
            "across": dict(run.point.across),
            "seed": run.point.seed,
            "adapters": str(run.point.adapters),
            "scores": dict(figures),
            "base": compute_figures(run.scores, BASE),
        }
        for run, figures in zip(row.runs, row.figures, strict=True)
    ]


def _spreads(spreads: Mapping[str, Spread | None]) -> dict[str, Any]:
    return {name: None if spread is None else asdict(spread) for name, spread in spreads.items()}


def _differences(differences: Mapping[str, Difference]) -> dict[str, Any]:
    return {name: asdict(difference) for name, difference in differences.items()}
