"""The page of a report: what is said of unusual pictures, and what many training pictures cost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adapters.cascade.results import Sample
from finetune.data.pictures import Picture
from finetune.evaluation.drawing import Shot
from finetune.evaluation.intervals import Score
from finetune.evaluation.page import PHOTOS, write_page
from finetune.evaluation.results import VARIANTS, Photo, Results
from finetune.evaluation.scoring import MEANINGS, TITLES, PictureScore
from finetune.evaluation.verdict import write_verdict

SHOT = Shot("subject", 0, 0, "a <sks> dog", "a <sks> dog", "a dog", 7)


def results_of(
    folder: Path, *, photos: int = 3, flagged: bool = False, low: float = 0.1
) -> Results:
    file = folder / "photo.npy"
    np.save(file, np.zeros((20, 30, 3), dtype=np.uint8))
    rising, falling = Score(0.2, low, 0.3, 1), Score(-0.2, -0.3, -0.1, 1)
    sample = Sample({1: Image.new("RGB", (600, 600), "red")}, SHOT.prompt, SHOT.seed, flagged)
    variants = ("base", "fine_tuned")
    return Results(
        recipe="small",
        encoders={"clip": "a/clip", "dino": "a/dino"},
        adapters={"runs/a": {1: 0.5, 2: 1.0}, "runs/b": 0.7},
        variants={name: dict.fromkeys(TITLES) | {"clip_i": rising} for name in variants},
        changes={"fine_tuned": {"clip_i": rising, "pres": falling}},
        ceiling={"clip_i": None},
        shots=[SHOT],
        samples={key: [sample] for key in variants},
        picture_scores={key: [PictureScore(0.5, 0.5, photos - 1, 0.75)] for key in variants},
        photos=[Photo(Picture(file, "", f"photo {number}"), 16) for number in range(photos)],
    )


def test_every_score_has_a_title_and_a_meaning() -> None:
    assert set(TITLES) == set(MEANINGS)


def test_prompts_and_settings_are_shown_as_text(tmp_path: Path) -> None:
    page = write_page(results_of(tmp_path))
    assert "a &lt;sks&gt; dog" in page
    assert "<sks>" not in page
    assert "runs/a at 1:0.5,2:1.0, runs/b at 0.7" in page
    assert "scored by a/clip and a/dino" in page
    assert page.count("CLIP-I, generated vs. real pictures") == 2
    assert "PRES" not in page  # not defined for any variant
    assert "<th>base (floor)</th>" in page
    assert "<th>real pictures (ceiling)</th>" in page
    for head in ("base (floor)", "fine-tuned", "real pictures (ceiling)"):
        assert page.count(f'<td data-of="{head}">') == 1  # for narrow screens
    assert "<th>CLIP-I, generated vs. real pictures&nbsp;↑</th>" in page


def test_the_verdict_stands_first(tmp_path: Path) -> None:
    results = results_of(tmp_path)
    page = write_page(results)
    verdict = f'<p class="verdict">{write_verdict(results)}</p>'
    assert page.index("<h1>") < page.index(verdict) < page.index("<table ")


def test_the_legend_says_what_is_resampled(tmp_path: Path) -> None:
    one = results_of(tmp_path)
    several = replace(one, shots=[SHOT, replace(SHOT, place=1), replace(SHOT, group="others")])
    two_of_one = replace(one, shots=[SHOT, replace(SHOT, number=1)])
    own, other = "with the subject", "without the subject"
    for results, alone in ((one, own), (several, other), (two_of_one, own)):
        said = f"gives, or the pictures where there is only one prompt ({alone}); of few"
        assert said in results.explain_intervals()
    many = replace(one, shots=[SHOT, replace(SHOT, place=1)])
    assert "resampling the prompts gives; of few" in many.explain_intervals()
    assert one.explain_intervals() in write_page(one)


def test_the_table_fits_a_terminal_with_all_variants(tmp_path: Path) -> None:
    results, scores = results_of(tmp_path), dict.fromkeys(TITLES, Score(0.512, 0.401, 0.623, 12))
    table = replace(results, variants=dict.fromkeys(VARIANTS, scores), ceiling=scores).table()
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith("CLIP-I, generated  ")
    assert lines[1].count("0.512") == lines[2].count("0.401 to 0.623") == len(VARIANTS) + 1


def test_a_change_is_coloured_only_if_it_is_certain(tmp_path: Path) -> None:
    assert '<small class="good">+0.200' in write_page(results_of(tmp_path))
    unsure = write_page(results_of(tmp_path, low=-0.1))
    assert "<small>+0.200" in unsure


def test_less_of_a_bad_thing_is_good(tmp_path: Path) -> None:
    results = results_of(tmp_path)
    for scores in results.variants.values():
        assert isinstance(scores, dict)
        scores["pres"] = Score(0.5, None, None, 1)
    assert '<small class="good">-0.200' in write_page(results)


def test_a_blackened_picture_says_so(tmp_path: Path) -> None:
    page = write_page(results_of(tmp_path, flagged=True))
    assert page.count("blackened by the safety checker, not scored") == 2
    assert "CLIP-T 0.500" not in page


@pytest.mark.parametrize("photos", [3, PHOTOS + 6])
def test_of_many_training_pictures_few_are_embedded(photos: int, tmp_path: Path) -> None:
    page = write_page(results_of(tmp_path, photos=photos))
    shown = min(photos, PHOTOS)
    nearest = photos > PHOTOS  # the last one, which is shown only next to its pictures
    assert page.count("background-image") == shown + nearest
    assert page.count('title="photo ') == shown + 2
    assert ("and 6 more" in page) == (photos > PHOTOS)
