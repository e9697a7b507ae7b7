"""CLIP scores, on the embedded CLIP and real pictures of the embedded world."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.errors import UserError
from finetune.metrics import ClipScorer, clip_i, clip_i_ceiling, clip_t

ROOT = Path(__file__).parent.parent
SUBJECTS = sorted(path for path in (ROOT / "datasets").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer(str(ROOT / "models/if-tiny/clip"))


def pictures(subject: Path) -> tuple[list[Image.Image], list[str]]:
    rows = [json.loads(line) for line in (subject / "metadata.jsonl").read_text().splitlines()]
    return (
        [Image.open(subject / row["file_name"]) for row in rows],
        [row["text"].replace("sks ", "") for row in rows],
    )


def test_there_are_three_subjects_or_more_of_five_pictures_or_more() -> None:
    assert len(SUBJECTS) >= 3
    for subject in SUBJECTS:
        images, texts = pictures(subject)
        assert len(images) >= 5
        assert all(min(image.size) >= 512 for image in images)
        assert len(set(texts)) == len(texts)


def test_scores_are_cosines() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = (
        torch.nn.functional.normalize(torch.randn(count, 4, generator=draw), dim=-1)
        for count in (3, 5)
    )
    pairs = [float(np.dot(a, b)) for a in one.numpy() for b in other.numpy()]
    assert clip_i(one, other) == pytest.approx(np.mean(pairs), rel=1e-5)
    distinct = [
        float(np.dot(a, b))
        for i, a in enumerate(other.numpy())
        for j, b in enumerate(other.numpy())
        if i != j
    ]
    assert clip_i_ceiling(other) == pytest.approx(np.mean(distinct), rel=1e-5)
    assert clip_t(one, one) == pytest.approx(1.0)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda path: path.name)
def test_the_embedded_clip_knows_real_pictures(scorer: ClipScorer, subject: Path) -> None:
    images, texts = pictures(subject)
    similarity = scorer.images(images) @ scorer.texts(texts).T
    assert similarity.argmax(dim=1).tolist() == list(range(len(texts)))


def test_the_embedded_clip_tells_subjects_apart(scorer: ClipScorer) -> None:
    vectors = [scorer.images(pictures(subject)[0]) for subject in SUBJECTS]
    for one in vectors:
        for other in vectors:
            if other is not one:
                assert clip_i(one, other) < clip_i_ceiling(one)


def test_a_missing_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"comparison\.clip must name a CLIP model"):
        ClipScorer(str(tmp_path / "nowhere"))
