"""Outcomes from scores on disk: means over seeds, parts of ceiling and base, and the page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.sweeping.outcomes import compute_figures
from finetune.sweeping.progress import add_seconds, is_scored, read_seconds
from finetune.sweeping.report import write_page, write_text_report
from finetune.sweeping.results import to_json
from finetune.sweeping.scoring import (
    FLAGGED,
    list_files,
    read_drawn,
    read_scores,
    scores_file,
)
from tests.builders.sweeps import (
    BASE_OTHERS,
    CEILING,
    PETS,
    collect,
    finish_sweep,
    save_adapter,
)


def test_seeds_are_averaged_and_scales_kept_apart(tmp_path: Path) -> None:
    outcomes = collect(finish_sweep(tmp_path))
    assert [(row.settings["rank"], row.scale) for row in outcomes.rows] == [
        (rank, scale) for rank in ("4", "8", "16") for scale in (0.5, 1.0)
    ]
    row = outcomes.rows[1]
    fidelity, preservation = row.scores["fidelity"], row.scores["preservation"]
    assert fidelity is not None
    assert preservation is not None
    assert (fidelity.low, fidelity.high) == pytest.approx((0.125 / CEILING, 0.135 / CEILING))
    assert fidelity.error == pytest.approx(0.005 / CEILING)  # half the distance of the two
    assert fidelity.count == 2
    assert fidelity.mean == pytest.approx(0.13 / CEILING)
    assert preservation.mean == pytest.approx((0.5 - 0.13 / 4) / 0.5)
    assert [run.point.seed for run in row.runs] == [0, 1]
    assert row.seconds is not None
    assert row.seconds.mean == 65
    assert len(outcomes.front) == 6  # more of one score is less of the other throughout
    json.dumps(to_json(outcomes), allow_nan=False)


def test_each_subject_is_compared_with_its_own_base(tmp_path: Path) -> None:
    outcomes = collect(finish_sweep(tmp_path, across={"pet": PETS}))
    assert outcomes.across == {"pet": ["dog", "cat"]}
    assert len(outcomes.rows) == 6
    row = outcomes.rows[1]
    assert [(run.point.across["pet"], run.point.seed) for run in row.runs] == [
        *(("dog", 0), ("dog", 1)),
        *(("cat", 0), ("cat", 1)),
    ]
    drawn = 0.5 - 0.13 / 4  # the mean of the seeds, the same for both
    shares = {pet: drawn / base for pet, base in BASE_OTHERS.items()}
    for pet, share in shares.items():
        assert row.select("pet", pet).place[1] == pytest.approx(share)
        assert outcomes.base().select("pet", pet).place == pytest.approx((0.1 / CEILING, 1))
    assert row.place[1] == pytest.approx(sum(shares.values()) / 2)

    found = to_json(outcomes)["outcomes"][1]
    assert found["across"]["pet"]["cat"]["preservation"]["mean"] == pytest.approx(shares["cat"])
    assert [run["across"] for run in found["runs"]] == [{"pet": "dog"}] * 2 + [{"pet": "cat"}] * 2
    assert {run["base"]["clip_t_others"] for run in found["runs"][2:]} == {0.4}
    table, page = write_text_report(outcomes), write_page("a sweep", outcomes)
    cell = f"{row.select('pet', 'cat').place[0]:.3f}, {shares['cat']:.3f}"
    assert cell in table.partition("by pet")[2]
    assert f"<td>{cell}</td>" in page.partition("by pet")[2]


def test_without_a_ceiling_fidelity_is_clip_i(tmp_path: Path) -> None:
    (point, *_) = finish_sweep(tmp_path, seeds=(0,), ceiling=None)
    assert compute_figures(read_scores(point.recipe), "1")["fidelity"] == 0.125
    assert "Fidelity: CLIP-I<" in write_page("title", collect([point]))


def test_scores_are_of_these_adapters_and_settings(tmp_path: Path) -> None:
    point = finish_sweep(tmp_path)[0]
    assert is_scored(point.recipe, (0.5, 1.0))
    assert not is_scored(point.recipe, (0.5, 0.7))
    assert point.recipe.evaluation is not None
    other = point.recipe.evaluation.model_copy(update={"seed": 5})
    assert not is_scored(point.recipe.model_copy(update={"evaluation": other}), (1.0,))
    save_adapter(point, b"another")
    assert not is_scored(point.recipe, (1.0,))


@pytest.mark.parametrize(
    "change",
    [
        lambda known: [],
        lambda known: None,
        lambda known: 3,
        lambda known: known | {"variants": []},
        lambda known: known | {"variants": {"1": {}}},  # not the base's
        lambda known: known | {"variants": known["variants"] | {"1": 3}},
        lambda known: known | {"variants": known["variants"] | {"1": {"clip_i": {}}}},
        lambda known: known | {"ceiling": {"clip_i": {"value": "high"}}},
        lambda known: {name: known[name] for name in ("key", "format", "ceiling")},
        lambda known: {name: known[name] for name in ("key", "format", "variants")},
    ],
)
def test_damaged_scores_count_as_none(change: Callable[[Any], Any], tmp_path: Path) -> None:
    point = finish_sweep(tmp_path)[0]
    file = scores_file(point.recipe)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert not is_scored(point.recipe, (1.0,))
    assert read_scores(point.recipe)["variants"] == {}


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", "{", "{}", '{"seconds": null}', '{"seconds": NaN}', "[" * 9]
)
def test_a_damaged_time_counts_as_none(text: str, tmp_path: Path) -> None:
    point = finish_sweep(tmp_path)[0]
    add_seconds(point.recipe, 1.0)
    (point.folder / "training_time.json").write_text(text)
    assert read_seconds(point.recipe) is None
    add_seconds(point.recipe, 2.0)
    assert read_seconds(point.recipe) == 2.0


@pytest.mark.parametrize("flags", ["3", "[]", "null", "[0, 1]", "[true]", "{"])
def test_pictures_with_a_damaged_list_are_drawn_again(flags: str, tmp_path: Path) -> None:
    keep(tmp_path)
    (tmp_path / FLAGGED).write_text(flags)
    assert read_drawn(tmp_path, 2) is None


def test_missing_and_damaged_pictures_are_drawn_again(tmp_path: Path) -> None:
    first, second = keep(tmp_path)
    found = read_drawn(tmp_path, 2)
    assert found is not None
    assert found[1] == [False, True]
    assert read_drawn(tmp_path, 3) is None
    second.write_bytes(second.read_bytes()[:40])
    assert read_drawn(tmp_path, 2) is None
    second.unlink()
    assert read_drawn(tmp_path, 2) is None
    assert first.exists()


def keep(folder: Path) -> list[Path]:
    """Two kept pictures, of which the safety checker has blackened the second."""
    files = list_files(folder, 2)
    for file in files:
        Image.new("RGB", (8, 8), "red").save(file)
    (folder / FLAGGED).write_text("[false, true]")
    return files
