"""Expected scores judge the data that they were measured on, and no other."""

import importlib
import sys

import pytest

from finetune.evaluation import comparison
from tests.builders import ROOT

LEARNT = {"clip_i": 0.462, "clip_t": 0.658, "clip_t_others": 0.542}
QUICKSTART = str(ROOT / "recipes/quickstart.yaml")


@pytest.mark.parametrize(
    ("overrides", "shift", "said"),
    [
        ([], 0, "As expected"),
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
    scores = {f"{name}/fine_tuned": score + shift for name, score in LEARNT.items()}
    monkeypatch.setattr(comparison, "compare", lambda *_: ("", scores))
    monkeypatch.delitem(sys.modules, "finetune.compare", raising=False)
    command = importlib.import_module("finetune.compare")
    if said is None:
        with pytest.raises(SystemExit, match="2"):
            command.main([QUICKSTART, *overrides])
        return
    command.main([QUICKSTART, *overrides])
    assert capsys.readouterr().out.startswith(said)
