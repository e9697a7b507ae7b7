"""Grids and random draws: complete, repeatable, within their ranges, and named apart."""

import itertools
import math

import pytest

from adapters.arguments import LARGEST
from adapters.errors import UserError
from finetune.sweeping.axes import (
    Axis,
    Choices,
    Range,
    draw_random,
    expand_grid,
    list_overrides,
)
from finetune.sweeping.names import LONGEST, name_runs, name_variant, shorten_keys
from finetune.sweeping.reading import read_axis

RANK = Choices(("stage_1.adapter.rank", "stage_2.adapter.rank"), ("8", "16"))
KIND = Choices(("stage_1.adapter.kind",), ("lora", "dora", "loha"))
RATE = Range(("stage_1.optimizer.learning_rate",), 1e-4, 1e-2, log=True, whole=False)


def test_a_grid_has_every_combination_once() -> None:
    combinations = expand_grid([RANK, KIND])
    assert combinations == list(itertools.product(("8", "16"), ("lora", "dora", "loha")))
    assert expand_grid([]) == [()]
    assert list_overrides([RANK, KIND], combinations[0]) == [
        "stage_1.adapter.rank=8",
        "stage_2.adapter.rank=8",
        "stage_1.adapter.kind=lora",
    ]


def test_a_longer_random_search_begins_with_the_shorter_one() -> None:
    axes = [RANK, RATE]
    drawn = draw_random(axes, 20, seed=3)
    assert len(set(drawn)) == 20
    assert draw_random(axes, 7, seed=3) == drawn[:7]
    assert draw_random(axes, 7, seed=4) != drawn[:7]


def test_random_draws_exhaust_a_small_space_and_no_more() -> None:
    assert set(draw_random([RANK, KIND], 6, seed=0)) == set(expand_grid([RANK, KIND]))
    with pytest.raises(UserError, match=r"random asks for 7 .* have 6;"):
        draw_random([RANK, KIND], 7, seed=0)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("axis", "known"),
    [
        (RANK, "2"),
        (Range(("a",), 1, 3, log=False, whole=True), "3"),
        (Range(("a",), 1.0, 1.1, log=False, whole=False), "about 11"),  # of three digits
    ],
)
def test_far_too_many_draws_are_refused_at_once(axis: Axis, known: str) -> None:
    with pytest.raises(UserError, match=f"have {known};"):
        draw_random([axis], 10**6, seed=0)


@pytest.mark.parametrize("ends", [(-(2**63 - 1), 2**63 - 1), (-LARGEST, LARGEST)])
def test_the_widest_ranges_can_be_drawn_from(ends: tuple[float, float]) -> None:
    axis = read_axis("a", dict(zip(("low", "high"), ends, strict=True)))
    assert len(draw_random([axis], 5, seed=0)) == 5


@pytest.mark.parametrize(
    ("low", "high", "log", "whole"),
    [(1e-4, 1e-2, True, False), (0.0, 1.0, False, False), (1, 64, True, True), (2, 5, False, True)],
)
def test_a_range_is_drawn_evenly_within_its_ends(
    low: float, high: float, log: bool, whole: bool
) -> None:
    texts = [c[0] for c in draw_random([Range(("a",), low, high, log, whole)], 4, seed=0)]
    axis = Range(("a",), low, high, log, whole)
    rngs = itertools.count()
    values = [float(draw_random([axis], 1, seed=next(rngs))[0][0]) for _ in range(400)]
    assert all(low <= value <= high for value in values)
    middle = math.sqrt(low * high) if log else (low + high) / 2
    below = sum(value < middle for value in values) / len(values)
    assert below == pytest.approx(0.5, abs=0.1)
    assert all(text.isdigit() for text in texts) == whole


def test_a_range_keeps_its_ends_when_rounding_would_leave_it() -> None:
    axis = Range(("a",), 0.12345, 0.12346, log=False, whole=False)
    assert all(0.12345 <= float(text) <= 0.12346 for (text,) in draw_random([axis], 1, seed=0))


def test_names_are_distinct_repeatable_and_fit_a_folder() -> None:
    labels = shorten_keys([RANK.keys, KIND.keys])
    runs = [(values, seed) for values in expand_grid([RANK, KIND]) for seed in (0, 1)]
    names = name_runs(labels, runs)
    assert names[0] == "rank-8_kind-lora_seed-0"
    assert len(set(names)) == len(runs)
    assert [name_runs(labels, [run]) for run in runs] == [[name] for name in names]


def test_names_that_would_be_equal_or_long_end_in_a_hash() -> None:
    runs = [(("a b",), None), (("a+b",), None), (("c",), None), (("x" * 200,), None)]
    names = name_runs(["targets"], runs)
    assert len(set(names)) == 4
    assert names[2] == "targets-c"
    assert max(map(len, names)) <= LONGEST
    assert name_runs([], [((), None), ((), 3)]) == ["as_given", "seed-3"]


def test_scales_are_named_apart_and_read_back() -> None:
    scales = (0.7, 0.70000001, 1.0, 1234567.0, 1234568.0, 1e-7, 1e22, -0.5)
    assert [float(name_variant(scale)) for scale in scales] == list(scales)
    assert [name_variant(scale) for scale in (1, 0.5, -0.0)] == ["1", "0.5", "0"]
