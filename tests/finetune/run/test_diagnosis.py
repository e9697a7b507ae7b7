"""Each way to go wrong is recognised from the figures, in words, and a good run has none."""

import math

import pytest

from finetune.run.diagnosis import SYMPTOMS, diagnose
from finetune.run.figures import (
    CLIP_I,
    CLIP_T,
    FIXED_NOISE,
    HELD_OUT,
    NEAREST,
    OTHERS_CLIP_I,
    OTHERS_CLIP_T,
    SAMENESS,
    Validated,
    ceiling_of,
)

GOOD = {
    CLIP_I: [0.3, 0.5, 0.6, 0.7],
    ceiling_of(CLIP_I): [0.8] * 4,
    CLIP_T: [0.3, 0.31, 0.31, 0.3],
    SAMENESS: [0.4, 0.6, 0.7, 0.8],
    NEAREST: [0.5, 0.6, 0.8, 0.85],
    ceiling_of(NEAREST): [0.9] * 4,
    OTHERS_CLIP_T: [0.3, 0.3, 0.29, 0.29],
    OTHERS_CLIP_I: [0.2, 0.2, 0.21, 0.22],
    FIXED_NOISE: [0.2, 0.15, 0.12, 0.1],
    HELD_OUT: [0.2, 0.16, 0.15, 0.15],
}

BAD = [
    ("diverges", {FIXED_NOISE: [0.2, 0.1, 0.15, 0.3]}, "rises (0.200 to 0.300). Lower"),
    ("diverges", {FIXED_NOISE: [0.2, 0.1, 0.1, math.nan]}, "rises (0.200 to nan). Lower"),
    ("memorises", {HELD_OUT: [0.2, 0.15, 0.17, 0.2]}, "on those held out (0.200 to 0.200)"),
    (
        "collapses",
        {SAMENESS: [0.4, 0.6, 0.8, 0.97], CLIP_T: [0.3, 0.31, 0.28, 0.25]},
        "nearly the same (0.400 to 0.970), and the prompts are followed less (0.300 to 0.250)",
    ),
    ("leaks", {OTHERS_CLIP_T: [0.3, 0.28, 0.27, 0.2]}, "CLIP-T goes from 0.300 to 0.200"),
    ("leaks", {OTHERS_CLIP_I: [0.2, 0.3, 0.4, 0.5]}, "to the subject from 0.200 to 0.500"),
    ("copies", {NEAREST: [0.5, 0.6, 0.8, 0.95]}, "one of them (0.500 to 0.950)"),
    ("learns nothing", {CLIP_I: [0.3, 0.3, 0.305, 0.3]}, "the base's (0.300 to 0.300)"),
]


APART = (-0.02, 0.01, 0.02, -0.01)
"""The distances of pictures' values from their mean."""


def history(
    curves: dict[str, list[float]], count: int = 4, apart: tuple[float, ...] = APART
) -> list[Validated]:
    """Validations, in which the pictures of other prompts change alike."""
    found = []
    for index in range(count):
        figures = {tag: values[index] for tag, values in curves.items()}
        others = {tag: figures[tag] for tag in (OTHERS_CLIP_T, OTHERS_CLIP_I)}
        by_picture = {tag: [mean + each for each in apart] for tag, mean in others.items()}
        found.append(Validated(10 * index, figures, by_picture))
    return found


def test_a_good_run_has_no_trouble_at_any_time() -> None:
    for count in range(1, 5):
        assert diagnose(history(GOOD, count), 30) == {}
    for count in range(1, 5):
        assert diagnose([Validated(10 * index) for index in range(count)], 30) == {}


@pytest.mark.parametrize("tag", [CLIP_T, OTHERS_CLIP_T])
def test_a_text_score_near_nothing_is_no_fall(tag: str) -> None:
    """A tenth of a cosine near 0, or below it, is noise."""
    alike = {SAMENESS: [0.4, 0.6, 0.8, 0.97]} if tag == CLIP_T else {}
    for curve in ([-0.05, -0.05, -0.05, -0.05], [0.01, 0.01, 0.01, 0.005]):
        assert diagnose(history(GOOD | alike | {tag: curve}), 30) == {}
    fallen = history(GOOD | alike | {tag: [-0.05, -0.05, -0.06, -0.1]})
    assert list(diagnose(fallen, 30)) == ["collapses" if tag == CLIP_T else "leaks"]


@pytest.mark.parametrize(("kind", "curves", "words"), BAD)
def test_trouble_is_recognised(kind: str, curves: dict[str, list[float]], words: str) -> None:
    found = diagnose(history(GOOD | curves), 30)
    assert list(found) == [kind]
    assert words in found[kind]


LEAK = {OTHERS_CLIP_T: [0.3, 0.28, 0.27, 0.2]}


def test_few_pictures_are_no_evidence_of_a_leak() -> None:
    assert diagnose(history(GOOD | LEAK, apart=APART[:2]), 30) == {}
    assert diagnose(history(GOOD | LEAK, apart=APART), 30) != {}
    unknown = [Validated(each.step, each.figures) for each in history(GOOD | LEAK)]
    assert diagnose(unknown, 30) == {}


@pytest.mark.parametrize(("spread", "said"), [(0.05, True), (0.2, False)])
def test_a_leak_is_told_from_the_spread_of_its_changes(spread: float, said: bool) -> None:
    """A mean fall of 0.1 has a standard error of half of the spread."""
    first, *between, last = history(GOOD | LEAK)
    before = first.by_picture[OTHERS_CLIP_T]
    changes = [-0.1 + spread * each for each in (1.0, -1.0, 0.5, -0.5)]
    now = {OTHERS_CLIP_T: [b + c for b, c in zip(before, changes, strict=True)]}
    found = diagnose([first, *between, Validated(last.step, last.figures, now)], 30)
    assert ("leaks" in found) == said


@pytest.mark.parametrize(
    ("prior", "advice"),
    [
        (None, "Add prior preservation (prior), or take"),
        ("pictures", "or try prior.kind: output."),
        ("output", "to 0.220. Raise prior.share or prior.weight."),
    ],
)
def test_advice_against_a_leak_depends_on_the_prior(prior: str | None, advice: str) -> None:
    assert advice in diagnose(history(GOOD | LEAK), 30, prior)["leaks"]


def test_every_symptom_is_tested() -> None:
    assert {kind for kind, _, _ in BAD} == set(SYMPTOMS)
