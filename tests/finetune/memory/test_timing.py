"""The time of a run, from the arithmetic of its phases."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetune import plan as command
from finetune.memory import timing
from finetune.memory.fit import plan
from finetune.memory.footprint import Rehearsal
from finetune.memory.timing import estimate_seconds, find_rate, measure_rate
from finetune.recipe.schema import Recipe
from finetune.step.stages import STAGES
from tests.builders.commands import refusal
from tests.builders.random_cascade import RandomCascade


def tree(cascade: RandomCascade, folder: Path, **changes: Any) -> dict[str, Any]:
    few = {"stage_1": {"steps": 3}, "stage_2": {"steps": 2}}
    return {
        "name": "timed",
        "base": {"stage_1": str(cascade.stage_1), "stage_2": str(cascade.stage_2)},
        "data": {"source": "none", "prompt": "a photo"},
        "prior": {"prompts": ["a photo"], "count": 4, "sampling": few},
        "stage_1": {"steps": 10, "batch_size": 2, "adapter": {"rank": 1}},
        "validation": {"prompts": ["a cat"], "every": 4, "sampling": few},
        "cache_dir": str(folder / "cache"),
        **changes,
    }


def works(cascade: RandomCascade, folder: Path, **changes: Any) -> dict[str, float]:
    recipe = Recipe.model_validate(tree(cascade, folder, **changes))
    return {phase.name: phase.work for phase in plan(recipe).phases}


def test_phases_take_as_long_as_they_are(random_cascade: RandomCascade, tmp_path: Path) -> None:
    own = tree(random_cascade, tmp_path)
    before = works(random_cascade, tmp_path)
    assert before.pop("encoding captions") == 0, "it is the loading that takes time"
    assert all(before.values())
    longer = works(random_cascade, tmp_path, stage_1=own["stage_1"] | {"steps": 20})
    assert longer["stage_1, training"] == 2 * before["stage_1, training"]
    # validations at 0, 4, 8, 10, and at 0, 4, 8, 12, 16, 20
    assert longer["stage_1, validation"] == pytest.approx(before["stage_1, validation"] * 6 / 4)
    more = works(random_cascade, tmp_path, prior=own["prior"] | {"count": 16})
    # one batch of 4, and two of 8
    assert 2 < more["class pictures"] / before["class pictures"] < 4.1
    always = works(
        random_cascade, tmp_path, validation=own["validation"] | {"through_stage_2": "always"}
    )
    through = "stage_1, samples through stage_2"
    assert always[through] == pytest.approx(4 * before[through])


def test_pictures_are_drawn_batch_by_batch(random_cascade: RandomCascade, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(tree(random_cascade, tmp_path))
    sources = {1: recipe.source(STAGES[1])}
    stage, device = STAGES[1], torch.device("cuda")
    rehearsal = Rehearsal.of(stage, recipe.training(stage), sources, device)
    one, two = (rehearsal.drawing_work(n, n, steps=1) for n in (1, 2))
    assert rehearsal.drawing_work(5, 2, steps=3) == pytest.approx(3 * (2 * two + one))
    assert one < two < 2 * one, "what each kernel costs is the same for two"


def test_the_command_tells_time_only_by_a_known_rate(
    random_cascade: RandomCascade,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(random_cascade, tmp_path)))
    command.main([str(path)])
    assert "without loading" not in capsys.readouterr().out

    def minutes(rate: str) -> int:
        command.main([str(path), "--rate", rate])
        shown = capsys.readouterr().out
        assert re.search(r"^phase of the run +GiB +time$", shown, re.MULTILINE)
        found = re.search(r"^in all, without loading +(?:(\d+) h )?(\d+) min", shown, re.MULTILINE)
        assert found is not None
        return 60 * int(found[1] or 0) + int(found[2])

    assert minutes("0.002") == pytest.approx(minutes("0.004") * 2, abs=2)
    assert "--rate must be a number above 0" in refusal(capsys, command.main, path, "--rate", "0")


def test_a_rate_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []

    def measure(*_: object) -> float:
        measured.append(5e12)
        return 5e12

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(timing, "measure_rate", measure)
    assert [find_rate(tmp_path), find_rate(tmp_path)] == [5e12, 5e12]
    assert len(measured) == 1
    (tmp_path / "rates.json").write_text("[damaged")
    assert find_rate(tmp_path) == 5e12
    assert len(measured) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_rate(tmp_path) is None


def test_the_rate_is_that_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.05)
    assert measure_rate(torch.device("cpu"), 64) > 1e6


def test_the_measured_steps_are_foreseen() -> None:
    """Stage I XL and Stage II L at batch 4 on an H100 that multiplies at 684 TFLOP/s."""
    for work, measured in ((33.0e12, 0.0603), (60.4e12, 0.1294)):
        assert estimate_seconds(work, 684e12) == pytest.approx(measured, rel=0.1)
