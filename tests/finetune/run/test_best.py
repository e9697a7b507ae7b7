"""The choice among validations: the best figure under a bound, or else the nearest to the bound."""

import math
from dataclasses import replace

import numpy as np
import pytest

from finetune.recipe.schema import Best
from finetune.run.best import choose, explain, has_stalled
from finetune.run.chance import student_t
from finetune.run.figures import CLIP_I, HELD_OUT, OTHERS_CLIP_T, Validated


def history(
    likeness: list[float], others: list[float], held_out: list[float], spread: float = 0.01
) -> list[Validated]:
    """Validations of six pictures, whose values differ from the figures by the spread or so."""
    noise = np.random.default_rng(0).normal(size=(len(likeness), 3, 6))
    noise -= noise.mean(axis=2, keepdims=True)
    validations = []
    for index, figures in enumerate(zip(likeness, others, held_out, strict=True)):
        by_tag = dict(zip((CLIP_I, OTHERS_CLIP_T, HELD_OUT), figures, strict=True))
        by_picture = {
            tag: list(value + spread * noise[index, row])
            for row, (tag, value) in enumerate(by_tag.items())
        }
        validations.append(Validated(10 * index, by_tag, by_picture))
    return validations


RISING = history([0.1, 0.5, 0.6, 0.9], [0.5, 0.5, 0.49, 0.3], [0.3, 0.1, 0.2, 0.2])


@pytest.mark.parametrize(
    ("best", "step"),
    [
        ({"keep_others": None}, 30),
        ({"keep_others": 0.97}, 20),
        ({"keep_others": 0.99}, 10),
        ({"figure": "held_out", "keep_others": None}, 10),
        ({"figure": "held_out", "keep_others": 0.5}, 10),
    ],
)
def test_the_best_figure_under_the_bound_is_chosen(best: dict[str, object], step: int) -> None:
    chosen = choose(RISING, Best.model_validate(best))
    assert chosen is not None
    assert chosen.step == step


def test_the_base_is_no_candidate_and_the_last_of_equals_wins() -> None:
    best = Best(keep_others=None)
    assert choose(RISING[:1], best) is None
    same = history([0.9, 0.5, 0.5], [1, 1, 1], [1, 1, 1])
    chosen = choose(same, best)
    assert chosen is same[2]
    broken = history([0.1, math.nan, 0.2], [1, 1, 1], [1, 1, 1])
    assert choose(broken, best) is broken[2]


@pytest.mark.parametrize(
    ("spread", "step"),
    [(0.01, 20), (0.5, 40)],  # a fall of every picture, and one that is within their spread
)
def test_an_earlier_step_is_chosen_only_if_it_is_better_by_more_than_chance(
    spread: float, step: int
) -> None:
    falling = history([0.1, 0.5, 0.6, 0.5, 0.4], [1] * 5, [1] * 5, spread)
    forgetting = history([0.1, 0.5, 0.6, 0.7, 0.8], [1, 1, 1, 0.9, 0.8], [1] * 5, spread)
    for each in (falling, forgetting):
        chosen = choose(each, Best())
        assert chosen is not None
        assert chosen.step == step
        sentences = explain(each, Best(), stopped_early=False)
        assert "The best validation is that of step 20 (the run went on to step 40)" in sentences
        assert ("The later step 40" in sentences) is (step == 40)


def test_a_few_pictures_choose_the_last_step_and_that_is_said() -> None:
    few = [
        replace(each, by_picture={tag: values[:3] for tag, values in each.by_picture.items()})
        for each in history([0.1, 0.6, 0.2], [1] * 3, [1] * 3)
    ]
    chosen = choose(few, Best())
    assert chosen is few[2]
    assert "as of 3 pictures no difference is certain" in explain(few, Best(), stopped_early=False)


def test_a_slow_fall_ends_at_the_last_step_that_is_near_the_best() -> None:
    """Each is within chance of the one before it, so they are compared with the best."""
    slow = history([0.1] + [0.6 - 0.02 * each for each in range(9)], [1] * 10, [1] * 10, 0.05)
    chosen = choose(slow, Best())
    assert chosen is not None
    assert 10 < chosen.step < 90
    choices = [choose(slow[: 2 + each], Best()) for each in range(9)]
    for before, now, newest in zip(choices, choices[1:], slow[2:], strict=False):
        assert now is before or now is newest


@pytest.mark.parametrize(
    ("freedom", "expected"), [(3, 3.182), (5, 2.571), (11, 2.201), (47, 2.012)]
)
def test_students_t_is_as_published(freedom: int, expected: float) -> None:
    """R, ``qt(0.975, freedom)``."""
    assert student_t(freedom) == pytest.approx(expected, rel=0.01)


def test_without_any_within_the_bound_the_nearest_is_exported_and_said() -> None:
    far = history([0.1, 0.5, 0.6], [0.5, 0.2, 0.4], [1, 1, 1])
    chosen = choose(far, Best())
    assert chosen is far[2]
    sentence = explain(far, Best(), stopped_early=False)
    assert "No validation kept 97% of the base's CLIP-T" in sentence
    assert "step 20 came closest: other prompts keep 80.0%" in sentence


def test_patience_counts_validations_since_the_best() -> None:
    falling = history([0.1, 0.6, 0.5, 0.4], [1] * 4, [1] * 4)
    for patience, stalled in ((1, True), (2, True), (3, False), (None, False)):
        assert has_stalled(falling, Best(keep_others=None, patience=patience)) is stalled
    sentence = explain(falling, Best(keep_others=None), stopped_early=True)
    assert "step 10 (the run stopped early at step 30): clip_i is 0.6000" in sentence


@pytest.mark.parametrize("base", [0.0, -0.2])
def test_a_base_without_shares_is_no_bound(base: float) -> None:
    """A share of a negative CLIP-T would grow with forgetting."""
    forgetful = history([0.1, 0.5, 0.6], [base, base - 0.1, base - 0.3], [1, 1, 1])
    assert choose(forgetful, Best()) is None
    assert not has_stalled(forgetful, Best(patience=1))
    sentence = explain(forgetful, Best(), stopped_early=False)
    assert f"CLIP-T of other prompts is {base:.4f}, of which no share can be kept" in sentence
    assert "the last step is exported" in sentence
    unbounded = choose(forgetful, Best(keep_others=None))
    assert unbounded is forgetful[2]


def test_what_was_not_measured_is_not_chosen_and_said() -> None:
    for likeness, others in (([math.nan] * 3, [1.0] * 3), ([0.5] * 3, [math.nan] * 3)):
        unmeasured = history(likeness, others, [1, 1, 1])
        assert choose(unmeasured, Best()) is None
        sentence = explain(unmeasured, Best(), stopped_early=False)
        assert sentence.startswith("No validation has a measured clip_i with the CLIP-T of other")
