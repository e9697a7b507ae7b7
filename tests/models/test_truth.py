"""What is known of the embedded world: true renders, and the scores beside theirs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adapters import AdapterSpec, PictureInfo, Sample, Sampling
from adapters.cascade.results import SHEET
from adapters.errors import UserError
from finetune.evaluation.metrics import ClipScorer
from models import truth
from models.scenes import read_sprites, to_image
from models.subjects import SHOTS, SUBJECTS, photograph
from models.truth import OTHERS, OWN, render_true
from models.world import BACKGROUNDS, FORMS, SEEN, THINGS, caption, fill, parse_caption
from tests.builders import ROOT
from tests.builders.adapters import export, trained_unet
from tests.builders.commands import refusal

NO_FONT = Path("no/such/font.ttf")
RECIPE = str(ROOT / "recipes/quickstart.yaml")
FEW = (
    "validation.sampling={stage_1: {steps: 2}, stage_2: {steps: 2, noise_level: 100}}",
    "evaluation.prompts=[a sks octopus on a black background]",
    "evaluation.other_prompts=[a pizza on a green background]",
)


def test_a_caption_is_parsed_to_what_it_was_made_of() -> None:
    for background in range(len(BACKGROUNDS)):
        for thing in range(len(THINGS)):
            assert parse_caption(caption(thing, background)) == (thing, background)
    for form in FORMS:
        if "{name}" in form.text:
            named = 7 if "{background}" in form.text else None
            assert parse_caption(fill(form.text, 3, 7)) == (3, named)
    assert parse_caption("a octopus on a teal background") == parse_caption(
        "an octopus on a teal background"
    )


@pytest.mark.parametrize("text", ["", "a dog on the moon", "a banana on a beach", "a sks octopus"])
def test_a_caption_of_another_world_is_named(text: str) -> None:
    with pytest.raises(UserError, match="is no caption of the embedded world"):
        render_true([text], 1, 0)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_stored_sprites_are_those_that_were_photographed(subject: str) -> None:
    sprite = read_sprites([parse_caption(subject)[0]], NO_FONT)[0]
    folder = ROOT / "datasets" / subject.replace(" ", "_")
    number = SUBJECTS.index(subject)
    with Image.open(folder / f"{number:02d}.png") as photo:
        assert np.array_equal(np.asarray(photo), to_image(photograph(sprite, SHOTS[number])))


def test_every_object_that_is_scored_has_a_stored_sprite() -> None:
    assert len(read_sprites(OWN, NO_FONT)) == 20
    assert set(OWN) <= set(SEEN)
    assert len(read_sprites([parse_caption(name)[0] for name in OTHERS], NO_FONT)) == len(OTHERS)


def test_a_sprite_that_is_not_stored_needs_the_font() -> None:
    with pytest.raises(UserError, match=r"no picture of banana in .* install Debian's"):
        read_sprites([parse_caption("a banana")[0]], NO_FONT)


def test_true_renders_show_their_captions_and_differ_in_place() -> None:
    captions = ["an octopus on a teal background", "a pizza on a green striped background"]
    pictures = render_true(captions, 2, seed=1)
    assert [picture.size for picture in pictures] == [(128, 128)] * 4
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert [p.tobytes() for p in render_true(captions, 2, seed=1)] == [
        p.tobytes() for p in pictures
    ]
    scorer = ClipScorer(str(ROOT / "models/if-tiny/clip"))
    likeness = scorer.images(pictures) @ scorer.texts(captions).T
    assert likeness.argmax(dim=1).tolist() == [0, 0, 1, 1]
    assert min(truth.score_shapes(pictures, [c for c in captions for _ in range(2)])) > 0.95


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where the shipped recipe's paths lead somewhere, with fewer pictures."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(truth, "OWN", OWN[:1])
    monkeypatch.setattr(truth, "DRAWS", 1)


@pytest.mark.usefixtures("at_root")
def test_a_finished_run_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in (1, 2):
        base = Path(f"models/if-tiny/stage_{stage}")
        unet = trained_unet(base, AdapterSpec())
        export(unet, tmp_path / "quickstart/adapters", base, stage, AdapterSpec())
    file = tmp_path / "truth.json"
    places = [f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]
    truth.main([RECIPE, *places, *FEW, "--json", str(file)])
    table, scores = capsys.readouterr().out.splitlines(), json.loads(file.read_text())
    assert len(table) == 1 + len(truth.ROWS)
    assert table[1].endswith("% of true renders")
    assert set(scores["base"]) == set(scores["fine_tuned"]) == set(scores["true"])
    assert scores["base"] != scores["fine_tuned"]
    assert scores["true"]["shape"] > 0.95 > scores["fine_tuned"]["shape"]
    for name in ("clip_i", "clip_t"):
        share = scores["fine_tuned"][name] / scores["true"][name]
        assert scores["share"][name] == pytest.approx(share)
    share = scores["fine_tuned"]["shape"] / scores["own"]["shape"]
    assert scores["share"]["shape"] == pytest.approx(share)


@pytest.mark.usefixtures("at_root")
def test_given_pictures_are_scored_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real photographs reach what can be reached."""
    file = tmp_path / "truth.json"
    places = [f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]
    photos = tmp_path / "photos"
    photos.mkdir()
    lines = Path("datasets/octopus/metadata.jsonl").read_text().splitlines()[:1]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    shutil.copy("datasets/octopus/00.png", photos)
    given = ["--pictures", str(photos), "--json", str(file)]
    truth.main([RECIPE, *places, *FEW, *given])
    scores = json.loads(file.read_text())
    assert set(scores["share"]) == {"clip_i", "clip_t", "shape"}  # no picture is of other things
    assert scores["fine_tuned"]["shape"] > 0.95
    assert min(scores["share"]["clip_i"], scores["share"]["clip_t"]) > 0.9
    assert "prompts of other things" not in capsys.readouterr().out


def test_the_last_stages_saved_pictures_are_read_with_their_prompts(tmp_path: Path) -> None:
    prompt = "an octopus on a teal background"
    info = PictureInfo(
        stage=2,
        prompts={1: prompt, 2: "a picture"},
        models={1: "one", 2: "two"},
        precisions={1: "fp32", 2: "fp32"},
        sampling=Sampling(),
    )
    small, large = (Image.new("RGB", (side, side)) for side in (32, 128))
    sample = Sample({1: small, 2: large}, prompt, 0, flagged=False, info=info)
    for stage in (1, 2):
        sample.save(tmp_path / f"000-stage_{stage}.png", stage)
    small.save(tmp_path / SHEET)  # has no record
    pictures, prompts = truth.read_drawn(tmp_path, tmp_path / "cache", 128)
    assert prompts == [prompt]
    assert [picture.size for picture in pictures] == [(128, 128)]


@pytest.mark.usefixtures("at_root")
def test_mistakes_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [RECIPE, f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]
    assert "train the recipe first" in refusal(capsys, truth.main, *places)
    empty = tmp_path / "empty"
    empty.mkdir()
    said = refusal(capsys, truth.main, *places, "--pictures", empty)
    assert "There are no pictures in" in said
    alone = ["evaluation=null", "validation.best=null", "validation.prompts=[]"]
    said = refusal(capsys, truth.main, *places, *alone, "--pictures", empty)
    assert "evaluation section" in said
    octopuses = [*places, "--pictures", "datasets/octopus"]
    for count in (0, -1):
        said = refusal(capsys, truth.main, *octopuses, "--images-per-prompt", count)
        assert f"--images-per-prompt must be 1 or more (got {count})" in said
    monkeypatch.setattr(truth, "draw", None)
    others = tmp_path / "others"
    others.mkdir()
    shutil.copy("datasets/octopus/00.png", others)
    (others / "00.txt").write_text("a pizza on a green background")
    said = refusal(capsys, truth.main, *places, "--pictures", others)
    assert "No picture is of 'octopus'" in said
    known = [*places, "evaluation.prompts=[a dog on the moon]", "--pictures", "datasets/octopus"]
    said = refusal(capsys, truth.main, *known, "evaluation.identifier=dog")
    assert "is no caption of the embedded world" in said
