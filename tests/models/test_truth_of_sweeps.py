"""All runs of a sweep beside what is true of the embedded world, from the pictures it has kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.atomic import write_text
from finetune.sweeping.points import Point, plan_points
from finetune.sweeping.schema import read_sweep
from finetune.sweeping.scoring import FLAGGED, base_folder, list_files, pictures_folder
from models import truth, truth_of_sweeps
from models.picture_scores import render_true
from models.truth import OWN
from tests.builders import ROOT
from tests.builders.commands import refusal

SWEEP = "recipes/sweeps/subjects.yaml"
FEW = [
    "validation.sampling={stage_1: {steps: 2}, stage_2: {steps: 2, noise_level: 100}}",
    'evaluation.prompts=["a {} on a black background"]',
    "evaluation.other_prompts=[a pizza on a green background]",
    "evaluation.pictures_per_prompt=2",
]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where the shipped recipe's paths lead somewhere, with fewer pictures."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(truth, "OWN", OWN[:1])
    monkeypatch.setattr(truth, "DRAWS", 1)


def keep_sweep(folder: Path) -> Path:
    """A sweep whose weight 1 draws what is true, and weight 2 the pizza whatever the prompt."""
    places = [f"runs_dir={folder / 'runs'}", f"cache_dir={folder / 'cache'}"]
    sweep = read_sweep(
        SWEEP,
        overrides=[*places, *FEW],
        over=["prior.weight=1,2"],
        options={"seeds": "0", "name": "mine"},
    )
    sweep_folder, points = plan_points(sweep)
    points = [point for point in points if point.across["subject"] in ("octopus", "robot")]
    for point in points:
        assert point.recipe.evaluation is not None
        subject = f"a {point.recipe.evaluation.subject} on a black background"
        pizza = "a pizza on a green background"
        drawn = subject if point.settings["weight"] == "1" else pizza
        draw_into(pictures_folder(point.recipe, 1.0), [drawn, pizza])
        draw_into(base_folder(point.recipe), [pizza, pizza])
        write_text(point.recipe_file, point.recipe.to_yaml())
    outcomes = [
        {
            "settings": {"weight": weight},
            "scale": 1.0,
            "runs": [describe(point) for point in points if point.settings["weight"] == weight],
        }
        for weight in ("1", "2")
    ]
    write_text(sweep_folder / "results.json", json.dumps({"outcomes": outcomes}))
    return sweep_folder


def draw_into(folder: Path, captions: list[str]) -> None:
    """Keep true renders as a sweep keeps what it has drawn: two of each prompt, in turn."""
    pictures = [render_true([text], 1, seed)[0] for seed in (1, 2) for text in captions]
    folder.mkdir(parents=True, exist_ok=True)
    for picture, file in zip(pictures, list_files(folder, len(pictures)), strict=True):
        picture.save(file)
    write_text(folder / FLAGGED, json.dumps([False] * len(pictures)))


def describe(point: Point) -> dict[str, Any]:
    return {"name": point.name, "across": dict(point.across), "seed": point.seed}


def test_all_runs_are_scored_and_what_they_share_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = dict.fromkeys(truth_of_sweeps.SCORERS, 0)

    def count(name: str, run: truth_of_sweeps.Run) -> dict[str, float]:
        counts[name] += 1
        return scorers[name](run)

    scorers = dict(truth_of_sweeps.SCORERS)
    counted = {name: lambda run, name=name: count(name, run) for name in scorers}
    monkeypatch.setattr(truth_of_sweeps, "SCORERS", counted)
    sweep, file = keep_sweep(tmp_path), tmp_path / "truth.json"
    truth.main([str(sweep), "--processes", "1", "--json", str(file)])
    assert counts == {"own": 1, "base": 2, "true": 2, "fine_tuned": 4}
    found = json.loads(file.read_text())
    assert [run["across"]["subject"] for run in found["runs"]] == ["octopus", "robot"] * 2
    for run in found["runs"][:2]:  # as good as it gets
        assert run["share"]["clip_i"] > 0.9
        assert run["share"]["clip_t"] > 0.9
        assert run["share"]["clip_t_others"] == pytest.approx(1)
        assert run["fine_tuned"]["shape"] > 0.95
    for run in found["runs"][2:]:
        assert run["share"]["clip_i"] < 0.5
        assert run["fine_tuned"]["shape"] < 0.7
    means = found["means"]["weight 1, scale 1"]["clip_i"]
    shares = [run["share"]["clip_i"] for run in found["runs"][:2]]
    assert means["mean"] == pytest.approx(sum(shares) / 2)
    change = found["differences"]["weight 2, scale 1"]["clip_i"]
    assert change["pairs"] == 2
    assert change["mean"] < -0.5
    table = capsys.readouterr().out
    assert "weight-1_subject-octopus_seed-0=1" in table
    assert "differences from: weight 1, scale 1" in table


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, truth.main, tmp_path)
    assert f"{tmp_path} is no folder of a sweep with a results.json of this version" in said
    said = refusal(capsys, truth.main, tmp_path, "--pictures", tmp_path)
    assert "--pictures and --images-per-prompt need a recipe" in said
    assert "must be 1 or more (got 0)" in refusal(capsys, truth.main, tmp_path, "--processes", 0)
