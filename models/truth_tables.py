"""The tables and figures of many runs beside what is true of the embedded world."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from adapters.tables import format_table
from finetune.sweeping.judgement import Difference, subtract
from finetune.sweeping.outcomes import Spread
from finetune.sweeping.points import Trial
from models.picture_scores import Scores
from models.truth import COLUMNS, ROWS, compute_shares
from models.truth_of_sweeps import Run

SHARES: Mapping[str, str] = {
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "clip_t_others": "CLIP-T of others",
    "shape": "SSIM",
    "shape_others": "SSIM of others",
}
"""The titles of the scores of `ROWS` in a table of many runs."""


def tabulate_runs(runs: Sequence[Run], scores: Sequence[Mapping[str, Scores]]) -> str:
    """Lay the shares of all runs out as tables: of each run, their means, and the differences."""
    columns = [f"{SHARES[name]} / {COLUMNS[column]}" for name, (_, column) in ROWS.items()]
    shares = list(map(compute_shares, scores))
    apart = [
        (f"{run.recipe.name}={run.scale:g}", *(_format(share.get(name)) for name in ROWS))
        for run, share in zip(runs, shares, strict=True)
    ]
    means = [
        (name, str(len(trials)), *(_format(Spread.of(column_of(trials, row))) for row in ROWS))
        for name, trials in group_trials(runs, shares).items()
    ]
    blocks = [
        format_table([("", *columns), *apart]),
        format_table([("means, ± standard error", "runs", *columns), *means]),
    ]
    if changes := list_changes(runs, shares):
        first = next(iter(group_trials(runs, shares)))
        rows = [(name, *(_format(found.get(row)) for row in ROWS)) for name, found in changes]
        blocks.append(format_table([(f"differences from: {first}", *columns), *rows]))
    return "\n\n".join(blocks)


def group_trials(runs: Sequence[Run], shares: Sequence[Scores]) -> dict[str, dict[Trial, Scores]]:
    """Group the shares of runs by combination, and within it by subject and seed."""
    groups: dict[str, dict[Trial, Scores]] = {}
    for run, share in zip(runs, shares, strict=True):
        groups.setdefault(run.combination, {})[run.trial] = share
    return groups


def column_of(trials: Mapping[Trial, Scores], name: str) -> list[float | None]:
    """List one share of all runs of a combination."""
    return [share.get(name) for share in trials.values()]


def list_changes(
    runs: Sequence[Run], shares: Sequence[Scores]
) -> list[tuple[str, dict[str, Difference | None]]]:
    """List each combination's differences from the first, of pairs of the same subject and seed."""

    def select(trials: Mapping[Trial, Scores], name: str) -> dict[Trial, float | None]:
        return {trial: share.get(name) for trial, share in trials.items()}

    first, *others = group_trials(runs, shares).items()
    return [
        (name, {row: subtract(select(trials, row), select(first[1], row)) for row in ROWS})
        for name, trials in others
    ]


def to_json(runs: Sequence[Run], scores: Sequence[Mapping[str, Scores]]) -> dict[str, Any]:
    """Return all figures for programs."""
    shares = list(map(compute_shares, scores))
    return {
        "runs": [
            {
                "name": run.recipe.name,
                "combination": run.combination,
                "across": dict(run.across),
                "seed": run.seed,
                "scale": run.scale,
                **found,
                "share": share,
            }
            for run, found, share in zip(runs, scores, shares, strict=True)
        ],
        "means": {
            name: {row: _plain(Spread.of(column_of(trials, row))) for row in ROWS}
            for name, trials in group_trials(runs, shares).items()
        },
        "differences": {
            name: {row: _plain(each) for row, each in found.items()}
            for name, found in list_changes(runs, shares)
        },
    }


def _plain(figure: Spread | Difference | None) -> dict[str, Any] | None:
    return None if figure is None else asdict(figure)


def _format(figure: float | Spread | Difference | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:.3f}" if isinstance(figure, float) else str(figure)
