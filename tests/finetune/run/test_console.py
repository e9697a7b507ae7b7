"""What a run says about itself, before and while it trains."""

import io
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from finetune.run.console import describe_start
from finetune.step.stages import STAGES
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import made_batches, material_of, recipe_of, train

LINE = re.compile(r"Training Stage 1: (\d+)%, step (\d) of 4, \S+ steps/s, .* left, loss \d\.\d{4}")

DRAWING = {
    "prompts": ["a cat"],
    "through_stage_2": "never",
    "sampling": {"stage_1": {"steps": 2}},
    "every": 4,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_has_a_line_for_each_point_and_no_bar(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(random_cascade, tmp_path, validation=DRAWING)
    train(recipe)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if "Stage 1" in line]
    assert "Validating" not in shown.err, "the bars of what is drawn"
    assert [match.groups() for line in lines if (match := LINE.fullmatch(line))] == [
        *(("25", "1"), ("50", "2"), ("75", "3"), ("100", "4"))
    ]
    assert len(lines) == 4
    said = shown.out.splitlines()
    for phase in ("loading", "training", "export"):
        assert sum(line.startswith(f"Stage 1, {phase}: ") for line in said) == 1, phase


def test_a_terminal_has_a_bar_that_says_what_it_is(
    random_cascade: RandomCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    train(recipe_of(random_cascade, tmp_path, validation=DRAWING))
    shown = screen.getvalue()
    assert re.search(r"\rTraining Stage 1: 100%\|", shown)
    assert "Validating, Stage 1" in shown
    assert not LINE.search(shown)


def test_a_run_says_where_it_goes_on(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe_of(random_cascade, tmp_path))
    assert "goes on" not in capsys.readouterr().out
    train(recipe_of(random_cascade, tmp_path, stage={"steps": 6}))
    assert re.search(r"Stage 1 goes on after step 4 of 6, from .*stage_1", capsys.readouterr().out)


@pytest.mark.parametrize("prior", [None, {"prompts": ["a dog"], "share": 0.5, "count": 3}])
def test_epochs_are_those_of_the_batches(
    random_cascade: RandomCascade, tmp_path: Path, prior: dict[str, object] | None
) -> None:
    stage = {"steps": 6, "batch_size": 4}
    recipe = recipe_of(random_cascade, tmp_path, stage=stage, prior=prior)
    pictures = material_of(recipe).pictures
    batches = made_batches(recipe)
    seen = Counter(
        batches.picture(step, place)[0].source
        for step in range(6)
        for place in range(batches.instance_count)
    )
    text = describe_start(recipe, pictures, [STAGES[1]], 1)
    (times,) = set(seen.values())
    assert f"each picture is seen {times} times" in text
    assert ("2 of them the prior's" in text) == (prior is not None)
    assert "3 of " in text
    assert str(recipe.folder) in text
    assert "trained already" in describe_start(recipe, pictures, [], 1)
