"""CLIP scores, on the embedded CLIP and real pictures of the embedded world."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from adapters.cascade.cascade import Cascade
from adapters.cascade.results import CascadeImages
from adapters.cascade.sampling import Sampling, StageSampling
from adapters.errors import UserError
from finetune.evaluation import comparison
from finetune.evaluation.metrics import ClipScorer, clip_i, clip_i_ceiling, clip_t
from finetune.recipe.schema import Base, Data, Evaluation, Expected, Recipe, Training, Validation
from tests.builders import ROOT
from tests.builders.random_cascade import RandomCascade

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


def test_one_picture_has_no_ceiling() -> None:
    assert clip_i_ceiling(torch.ones(1, 1)) is None
    scores = {"clip_i/real_to_real": None, "clip_i/base": 0.25, "clip_i/fine_tuned": 0.5}
    header, row = comparison.tabulate(scores).splitlines()
    assert header.split() == ["base", "fine-tuned", "ceiling"]
    assert row.split()[-3:] == ["0.250", "0.500", "-"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ((0.46, 0.62, 0.60), "As expected, to within 0.05"),
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
    names = [f"{key}/fine_tuned" for key in comparison.TITLES]
    scores: comparison.Scores = dict(zip(names, found, strict=True))
    if words is not None:
        assert comparison.judge(scores, expected).startswith(words)
        return
    with pytest.raises(UserError, match="did not learn what it should: CLIP"):
        comparison.judge(scores, expected)


@pytest.mark.parametrize("score", [None, float("nan")])
def test_a_score_that_is_not_defined_is_not_as_expected(score: float | None) -> None:
    expected = Expected(data="x", clip_i=-0.5, clip_t=0.5, spread=0.05)
    with pytest.raises(UserError, match="did not learn what it should: CLIP-I"):
        comparison.judge({"clip_i/fine_tuned": score, "clip_t/fine_tuned": 0.5}, expected)


def test_scores_that_were_not_asked_for_are_not_judged() -> None:
    expected = Expected(data="x", clip_i=0.5, clip_t=0.5, clip_t_others=0.5, spread=0.05)
    scores: comparison.Scores = {"clip_i/fine_tuned": 0.5, "clip_t/fine_tuned": 0.5}
    assert comparison.judge(scores, expected).startswith("As expected")


@pytest.mark.parametrize("own", [None, Sampling(stage_1=StageSampling(steps=3))])
def test_a_comparison_is_sampled_as_it_says(
    own: Sampling | None,
    random_cascade: RandomCascade,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe(
        name="test",
        base=Base(stage_1=str(random_cascade.stage_1)),
        data=Data(source="unread"),
        stage_1=Training(steps=1),
        validation=Validation(sampling=Sampling(stage_1=StageSampling(steps=2))),
        evaluation=Evaluation(
            prompts=("a cat",),
            stage_2_prompts=None if own is None else ("a pet",),
            other_prompts=("a dog",),
            subject="cat",
            identifier="cat",
            clip="unread",
            sampling=own,
            seed=5,
        ),
        cache_dir=str(tmp_path / "cache"),
    )
    seen = []

    def recording(cascade: Cascade, prompts: object, **options: object) -> CascadeImages:
        seen.append({name: options[name] for name in expected})
        return draw(cascade, prompts, **options)

    draw = Cascade.__call__
    monkeypatch.setattr(Cascade, "__call__", recording)
    monkeypatch.setattr(Cascade, "add_adapter", lambda *_: None)
    assert recipe.evaluation is not None
    expected = {
        "sampling": own or recipe.validation.sampling,
        "seed": 5,
        "stage_2_prompt": None if own is None else ("a pet", "a dog"),
    }
    before, after = comparison.sample_both(recipe, recipe.evaluation, ["a cat", "a dog"], tmp_path)
    assert seen == [expected, expected]
    assert [image.tobytes() for image in before] == [image.tobytes() for image in after]


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


def test_a_pickled_clip_is_not_opened(tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    shutil.copytree(ROOT / "models/if-tiny/clip", clip)
    weights = clip / "model.safetensors"
    torch.save(load_file(weights), clip / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="a CLIP model with safetensors weights"):
        ClipScorer(str(clip))


def test_a_missing_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.clip must name a CLIP model"):
        ClipScorer(str(tmp_path / "nowhere"))
