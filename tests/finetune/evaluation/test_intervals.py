"""Bootstrap intervals hold the true mean about as often as they say."""

import numpy as np
import pytest

from finetune.evaluation.intervals import summarize

NAN = float("nan")


@pytest.mark.parametrize(("groups", "each"), [(40, 1), (25, 4)])
def test_an_interval_holds_the_true_mean_in_about_19_of_20_cases(groups: int, each: int) -> None:
    """Pictures of one prompt are alike: without resampling whole prompts, half would miss."""
    draw, held, cases = np.random.default_rng(0), 0, 150
    for case in range(cases):
        of_group = draw.normal(0.5, 0.1, groups).repeat(each)
        values = of_group + draw.normal(0, 0.02, groups * each)
        score = summarize(values.tolist(), np.arange(groups).repeat(each).tolist(), seed=case)
        assert score is not None
        assert score.low is not None
        assert score.high is not None
        assert score.low < score.value < score.high
        held += score.low <= 0.5 <= score.high
    assert 0.89 < held / cases < 0.99


def test_an_interval_is_that_of_the_central_limit_theorem() -> None:
    """Of a mean over groups of different sizes, in closed form: a ratio of two sums over groups."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 6, 400)
    values = draw.normal(0.5, 0.1, 400).repeat(sizes) + draw.normal(0, 0.05, sizes.sum())
    groups = np.arange(400).repeat(sizes)
    for named in (groups, np.arange(len(values))):  # pictures that share a prompt, or do not
        score = summarize(values.tolist(), named.tolist())
        sums, counts = np.bincount(named, values), np.bincount(named)
        deviation = np.sqrt(np.square(sums - values.mean() * counts).sum()) / len(values)
        assert score is not None
        assert score.low is not None
        assert score.high is not None
        assert score.value == pytest.approx(values.mean())
        # 2,000 resamples determine a percentile to 3 % of the distance
        assert score.value - score.low == pytest.approx(1.96 * deviation, rel=0.08)
        assert score.high - score.value == pytest.approx(1.96 * deviation, rel=0.08)


def test_a_score_is_the_mean_of_the_values_that_are_known() -> None:
    score = summarize([0.1, NAN, 0.3, 0.5], [0, 0, 1, 1])
    assert score is not None
    assert score.value == pytest.approx(0.3)
    assert score.count == 3
    assert summarize([NAN], [0]) is None
    assert summarize([], []) is None


def test_a_single_prompt_varies_by_its_pictures() -> None:
    score = summarize([0.1, 0.3, 0.2], [7, 7, 7])
    assert score is not None
    assert score.low is not None
    assert 0.1 <= score.low < 0.2


def test_a_single_value_has_no_interval() -> None:
    score = summarize([0.25], [0])
    assert score is not None
    assert (score.value, score.low, score.high, score.count) == (0.25, None, None, 1)


def test_the_same_values_have_the_same_interval() -> None:
    values, groups = np.random.default_rng(0).random(12).tolist(), list(range(12))
    assert summarize(values, groups) == summarize(values, groups)
    assert summarize(values, groups) != summarize(values, groups, seed=1)
