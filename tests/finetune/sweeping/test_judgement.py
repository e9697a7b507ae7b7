"""Differences of pairs, their intervals, and what is recommended on them."""

import math
import random
from pathlib import Path

import pytest

from adapters.errors import UserError
from finetune.sweeping.judgement import (
    FEWEST,
    compare,
    compare_all,
    count_higher,
    find_interval,
    recommend,
)
from finetune.sweeping.outcomes import Outcomes
from finetune.sweeping.points import Point, find_reference
from finetune.sweeping.schema import Sweep
from tests.builders.sweeps import CEILING, PETS, collect, finish_sweep

SEEDS = (0, 1, 2, 3)


def noisy(point: Point, scale: float) -> tuple[float, float]:
    """Ranks 8 and 16 are 0.02 above rank 4, which seeds and subjects move far more together."""
    together = random.Random(f"{point.trial}").uniform(-0.1, 0.1)
    alone = random.Random(f"{point.trial} {point.settings}").uniform(-0.005, 0.005)
    better = 0.02 * (point.settings["rank"] != "4")
    keeps = {"4": 0.96, "8": 0.95, "16": 0.8}[point.settings["rank"]]
    others = 0.5 if point.across.get("pet", "dog") == "dog" else 0.4
    return (0.4 + together + alone + better) * scale, others * (1 - (1 - keeps) * scale)


def row_of(outcomes: Outcomes, rank: str) -> int:
    """The index of a rank's outcome at scale 1."""
    rows = enumerate(outcomes.rows)
    return next(i for i, row in rows if row.settings["rank"] == rank and row.scale == 1)


@pytest.mark.parametrize("count", [6, 9])
def test_intervals_of_few_values_hold_the_mean_as_often_as_they_say(count: int) -> None:
    rng, held = random.Random(0), 0
    for _ in range(300):
        low, high = find_interval([rng.gauss(0, 1) for _ in range(count)])
        held += low <= 0 <= high
    assert held / 300 > 0.92  # percentiles of resampled means: 0.86 of six, 0.90 of nine


def test_equal_values_have_an_interval() -> None:
    assert find_interval([0.25] * 6) == (0.25, 0.25)


def test_pairs_show_what_means_do_not(tmp_path: Path) -> None:
    points = finish_sweep(tmp_path, seeds=SEEDS, across={"pet": PETS}, score=noisy)
    outcomes = collect(points)
    four, eight = (outcomes.rows[row_of(outcomes, rank)] for rank in ("4", "8"))
    difference = compare(eight, four, "fidelity")
    assert difference is not None
    assert difference.pairs == 8
    assert difference.sign == 1
    assert difference.low is not None
    assert difference.low < 0.02 / CEILING < (difference.high or 0)
    spread = eight.scores["fidelity"]
    assert spread is not None
    assert spread.error is not None
    assert spread.error > 0.02 / CEILING  # more than what the pairs tell apart
    assert count_higher(eight, four, "pet", ["dog", "cat"]) == 2
    assert outcomes.reference == row_of(outcomes, "4")
    assert compare_all(outcomes)[row_of(outcomes, "8")]["fidelity"] == difference


def test_runs_without_a_partner_are_left_out(tmp_path: Path) -> None:
    points = finish_sweep(tmp_path, seeds=SEEDS, across={"pet": PETS}, score=noisy)
    outcomes = collect(points[:8] + points[11:16], total=len(points))
    four, eight = (outcomes.rows[row_of(outcomes, rank)] for rank in ("4", "8"))
    found = compare(eight, four, "preservation")
    assert found is not None
    assert found.pairs == 5 < FEWEST
    assert found.low is None
    assert found.sign == 0
    assert found.mean == pytest.approx(-0.01)


def test_the_closest_that_keeps_others_is_recommended(tmp_path: Path) -> None:
    points = finish_sweep(tmp_path, seeds=SEEDS, across={"pet": PETS}, score=noisy)
    outcomes = collect(points)
    said = recommend(outcomes)
    assert said.startswith(f"Recommended: {row_of(outcomes, '8') + 1} (rank 8, scale 1). Its")
    assert "highest of those that keep 90% of the base's CLIP-T of other prompts" in said
    assert said.endswith("that of all others that keep as much.")
    bold = recommend(collect(points, keep_others=0.5))
    best = "16" if "(rank 16, scale 1). Its" in bold else "8"
    other = {"8": "16", "16": "8"}[best]
    assert f"No difference in fidelity is shown from {row_of(outcomes, other) + 1} (" in bold
    shy = recommend(collect(points, keep_others=0.99))
    assert shy.startswith("No combination keeps 99% of")
    assert "(rank 4, scale 0.5) keeps most, 98.0%" in shy


def test_nothing_is_recommended_too_early(tmp_path: Path) -> None:
    points = finish_sweep(tmp_path, seeds=(0, 1), score=noisy)
    assert recommend(collect(points[:-1], total=len(points))) == ""
    assert "No difference can be shown with fewer than 6 runs" in recommend(collect(points))


def test_a_reference_is_named_as_folders_are(tmp_path: Path) -> None:
    points = finish_sweep(tmp_path, seeds=(0,))
    assert find_reference(Sweep(recipe="recipe.yaml"), points) == "rank-4=1"
    assert find_reference(Sweep(recipe="recipe.yaml", scales=(0.5, 0.7)), points) == "rank-4=0.5"
    assert find_reference(Sweep(recipe="recipe.yaml", against="rank-16"), points) == "rank-16=1"
    with pytest.raises(UserError, match=r"no combination 'rnak-8' .*did you mean rank-8"):
        find_reference(Sweep(recipe="recipe.yaml", against="rnak-8"), points)
    with pytest.raises(UserError, match=r"no scale '0\.3' to compare with, .*; valid: 1"):
        find_reference(Sweep(recipe="recipe.yaml", against="rank-8=0.3"), points)


def test_undefined_scores_are_not_compared(tmp_path: Path) -> None:
    points = finish_sweep(tmp_path, score=lambda point, scale: (math.nan, 0.4))
    outcomes = collect(points)
    assert compare(outcomes.rows[0], outcomes.rows[1], "nothing") is None
