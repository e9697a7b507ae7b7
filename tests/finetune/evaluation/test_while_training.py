"""Figures of validation's pictures, by the embedded CLIP."""

from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from PIL import Image

from finetune.data.pictures import Picture, load_pictures
from finetune.evaluation.metrics import ClipScorer, clip_i, clip_i_ceiling, clip_t
from finetune.evaluation.while_training import Likeness
from finetune.recipe.schema import Data, Evaluation
from finetune.run.figures import (
    CLIP_I,
    CLIP_T,
    NEAREST,
    OTHERS_CLIP_I,
    OTHERS_CLIP_T,
    SAMENESS,
    ceiling_of,
)
from finetune.run.validation import DrawnRow, PromptRow
from tests.builders import ROOT

SETTINGS = Evaluation(
    identifier="sks octopus",
    subject="octopus",
    prompts=("a sks octopus on a red background",),
    clip=str(ROOT / "models/if-tiny/clip"),
)


@pytest.fixture
def photos(tmp_path: Path) -> list[Picture]:
    return load_pictures(Data(source=str(ROOT / "datasets/octopus")), tmp_path, 32)


def drawn(kind: str, prompts: tuple[str, ...], pictures: list[Image.Image]) -> DrawnRow:
    return DrawnRow(PromptRow("row", prompts, kind), tuple(pictures))  # type: ignore[arg-type]


def test_figures_are_those_of_the_evaluation(photos: list[Picture]) -> None:
    real = [Image.fromarray(np.asarray(photo.pixels)).resize((32, 32), 3) for photo in photos]
    other = Image.new("RGB", (32, 32), "red")
    prompts = ("a sks octopus on a red background", "a sks octopus on a teal background")
    score = Likeness(SETTINGS).against_photos(photos, 32)
    rows = [
        drawn("subject", prompts, [real[0], other]),
        drawn("others", ("a pizza on a red background",), [other]),
        drawn("photos", ("not scored",), [other]),
    ]
    figures = score(rows)
    scorer = ClipScorer(SETTINGS.clip)
    vectors, photo_vectors = scorer.images([real[0], other]), scorer.images(real)
    texts = scorer.texts([prompt.replace("sks ", "") for prompt in prompts])
    expected = {
        CLIP_I: [clip_i(each[None], photo_vectors) for each in vectors],
        ceiling_of(CLIP_I): clip_i_ceiling(photo_vectors),
        CLIP_T: [clip_t(each[None], text[None]) for each, text in zip(vectors, texts, strict=True)],
        SAMENESS: float(vectors[0] @ vectors[1]),
        NEAREST: (1 + float((photo_vectors @ vectors[1]).max())) / 2,
        OTHERS_CLIP_T: [clip_t(vectors[1:], scorer.texts(["a pizza on a red background"]))],
        OTHERS_CLIP_I: [clip_i(vectors[1:], photo_vectors)],
    }
    for tag, value in expected.items():
        assert figures[tag] == pytest.approx(value, abs=1e-4), tag
    assert fmean(expected[CLIP_I]) < figures[ceiling_of(NEAREST)] < 1


def test_one_photo_has_no_ceiling(photos: list[Picture]) -> None:
    score = Likeness(SETTINGS).against_photos(photos[:1], 32)
    figures = score([drawn("subject", ("a sks octopus",), [Image.new("RGB", (32, 32))])])
    assert set(figures) == {CLIP_I, CLIP_T, NEAREST}
