"""Expected scores judge the data that they were measured on, and no other."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from adapters.errors import UserError
from finetune.evaluation import comparison
from finetune.evaluation.intervals import Score
from finetune.evaluation.scoring import TITLES
from finetune.recipe.schema import Expected
from tests.builders import ROOT


def scores_of(**values: float | None) -> dict[str, Score | None]:
    """Scores without intervals; those that are not given are not defined."""
    known = {name: Score(v, None, None, 1) for name, v in values.items() if v is not None}
    return dict.fromkeys(TITLES) | known


LEARNT = {"clip_i": 0.430, "clip_t": 0.641, "clip_t_others": 0.602}
QUICKSTART = str(ROOT / "recipes/quickstart.yaml")


@pytest.mark.parametrize(
    ("overrides", "shift", "said"),
    [
        ([], 0, "The scores are as expected"),
        ([], -0.3, None),
        (["data.source=my_dog"], -0.3, "Not judged: the expected scores are for datasets/octopus,"),
        (["data.source=my_dog", "evaluation.expected.data=my_dog"], -0.3, None),
        (["evaluation.expected=null"], -0.3, ""),
    ],
)
def test_scores_of_other_data_are_not_judged(
    overrides: list[str],
    shift: float,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = scores_of(**{name: score + shift for name, score in LEARNT.items()})
    report = SimpleNamespace(variants={"fine_tuned": scores})
    monkeypatch.setattr(comparison, "compare", lambda *_: ("", report))
    monkeypatch.delitem(sys.modules, "finetune.compare", raising=False)
    command = importlib.import_module("finetune.compare")
    if said is None:
        with pytest.raises(SystemExit, match="2"):
            command.main([QUICKSTART, *overrides])
        return
    command.main([QUICKSTART, *overrides])
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ((0.46, 0.62, 0.60), "The scores are as expected, to within 0.05"),
        (
            (0.44, 0.62, 0.60),
            "Lower than expected: CLIP-I, generated vs. real pictures is 0.440",
        ),
        ((0.46, 0.62, 0.40), "Lower than expected: CLIP-T, prompts without the subject is 0.400"),
        ((0.34, 0.50, 0.60), None),
        ((0.50, 0.66, 0.34), None),
    ],
)
def test_a_run_that_did_not_learn_is_reported(
    found: tuple[float, float, float], words: str | None
) -> None:
    expected = Expected(data="x", clip_i=0.5, clip_t=0.66, clip_t_others=0.5, spread=0.05)
    scores = scores_of(**dict(zip(comparison.JUDGED, found, strict=True)))
    if words is not None:
        assert comparison.judge(scores, expected).startswith(words)
        return
    with pytest.raises(UserError, match="did not learn what it should: CLIP"):
        comparison.judge(scores, expected)


@pytest.mark.parametrize("score", [None, float("nan")])
def test_a_score_that_is_not_defined_is_not_as_expected(score: float | None) -> None:
    expected = Expected(data="x", clip_i=-0.5, clip_t=0.5, spread=0.05)
    with pytest.raises(UserError, match="did not learn what it should: CLIP-I"):
        comparison.judge(scores_of(clip_i=score, clip_t=0.5), expected)


def test_scores_that_were_not_asked_for_are_not_judged() -> None:
    expected = Expected(data="x", clip_i=0.5, clip_t=0.5, clip_t_others=0.5, spread=0.05)
    assert comparison.judge(scores_of(clip_i=0.5, clip_t=0.5), expected).startswith(
        "The scores are as expected"
    )
