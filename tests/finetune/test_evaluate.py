"""The command: a run of a random cascade, its scores by the embedded CLIP, and its report."""

import json
import re
from argparse import Namespace
from contextlib import redirect_stdout
from html import escape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from adapters import read_picture_info
from adapters.errors import UserError
from finetune.evaluate import evaluate_and_save, main, read_adapters
from finetune.evaluation import EvaluationReport, evaluate
from finetune.evaluation.encoders import ClipScorer
from finetune.evaluation.metrics import clip_i, clip_i_ceiling, clip_t
from finetune.evaluation.results import VARIANTS
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Recipe
from finetune.train import train
from tests.builders import ROOT
from tests.builders.random_cascade import RandomCascade

pytestmark = pytest.mark.usefixtures("no_plan")

CLIP = ROOT / "models/if-tiny/clip"
PHOTOS = ROOT / "datasets/octopus"
PROMPTS = ("a sks octopus on a black background", "a sks octopus & <b>friends</b>")
SCALES: dict[str, list[dict[int, float]]] = {
    "base": [],
    "fine_tuned": [{1: 1, 2: 1}],
    "stage_1": [{1: 1}],
    "stage_2": [{2: 1}],
}
"""The recorded scales of the run's adapter by stage, in each variant."""
STEPS = "{stage_1: {steps: 2, guidance: 1.5}, stage_2: {steps: 2, guidance: 1.0}}"


@pytest.fixture(scope="module")
def recipe_file(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The resolved recipe of a finished run of two steps."""
    folder = tmp_path_factory.mktemp("evaluated")
    small = ["steps=2", "batch_size=1", "adapter.rank=2", "optimizer.learning_rate=1.0e-2"]
    recipe = load_recipe(
        ROOT / "recipes/quickstart.yaml",
        [
            *(f"runs_dir={folder / 'runs'}", f"cache_dir={folder / 'cache'}", "prior=null"),
            *(f"base.stage_{stage}={random_cascade.stage(stage)}" for stage in (1, 2)),
            *(f"data.source={PHOTOS}", f"evaluation.clip={CLIP}"),
            *("validation={loss_pictures: 0}", f"evaluation.sampling={STEPS}"),
            *(f"evaluation.prompts=[{PROMPTS[0]}, '{PROMPTS[1]}']",),
            *("evaluation.other_prompts=[a pizza]", "evaluation.class_prompts=[an animal]"),
            "evaluation.pictures_per_prompt=2",
            *(f"stage_{stage}.{setting}" for stage in (1, 2) for setting in small),
        ],
    )
    train(recipe, Accelerator(cpu=True))
    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    return file


@pytest.fixture(scope="module")
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)


@pytest.fixture(scope="module")
def shown(recipe_file: Path) -> str:
    """What the command prints after an evaluation of all variants."""
    with redirect_stdout(StringIO()) as written:
        main([str(recipe_file), "--stages", "apart", "--reference", str(PHOTOS)])
    return written.getvalue()


@pytest.fixture(scope="module")
def folder(shown: str, recipe: Recipe) -> Path:
    assert shown
    return recipe.folder / "evaluation"


@pytest.fixture(scope="module")
def scores(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return found


def drawn(folder: Path, scores: dict[str, Any], variant: str, group: str) -> list[Image.Image]:
    rows = [row for row in scores["pictures"] if (row["variant"], row["group"]) == (variant, group)]
    return [Image.open(folder / row["file"]) for row in rows]


def test_the_json_is_what_others_build_on(scores: dict[str, Any]) -> None:
    assert (scores["format"], scores["recipe"]) == (1, "quickstart")
    assert list(scores["variants"]) == list(VARIANTS)
    assert list(scores["changes"]) == list(VARIANTS)[1:]
    for variant in scores["variants"].values():
        assert variant["dino"] is None
        assert all(variant[name] for name in ("clip_i", "clip_t_others", "div", "pres", "copied"))
        score = variant["clip_t"]
        assert set(score) == {"value", "low", "high", "count"}
        assert score["low"] < score["value"] < score["high"]
        assert score["count"] == 4
    assert scores["ceiling"]["clip_i"]["count"] == 6
    assert scores["ceiling"]["dino"] is None


def test_scores_are_those_of_the_saved_pictures(folder: Path, scores: dict[str, Any]) -> None:
    scorer = ClipScorer(str(CLIP))
    photos = [Image.open(file).convert("RGB") for file in sorted(PHOTOS.glob("*.png"))]
    halved = [photo.reduce(2) for photo in photos]  # as they are kept for crops of 64 px
    real = scorer.images([each.resize((64, 64), Image.Resampling.BICUBIC) for each in halved])
    texts = scorer.texts([prompt.replace("sks ", "") for prompt in PROMPTS] * 2)
    for name, variant in scores["variants"].items():
        subject = scorer.images(drawn(folder, scores, name, "subject"))
        assert variant["clip_i"]["value"] == pytest.approx(clip_i(subject, real), abs=1e-5)
        assert variant["clip_t"]["value"] == pytest.approx(clip_t(subject, texts), abs=1e-5)
        others = scorer.images(drawn(folder, scores, name, "others"))
        pizza = scorer.texts(["a pizza"] * 2)
        assert variant["clip_t_others"]["value"] == pytest.approx(clip_t(others, pizza), abs=1e-5)
    ceiling = scores["ceiling"]["clip_i"]["value"]
    assert ceiling == pytest.approx(clip_i_ceiling(real), abs=1e-3)  # files are sorted otherwise


def test_pictures_carry_the_same_seeds_in_all_variants(
    folder: Path, scores: dict[str, Any]
) -> None:
    rows = scores["pictures"]
    assert len(rows) == 4 * 8 == len(list((folder / "pictures").glob("*/*.png")))
    by_variant = {name: [r for r in rows if r["variant"] == name] for name in VARIANTS}
    seeds = [row["seed"] for row in by_variant["base"]]
    assert seeds == [1000, 1001, 1002, 1003, 2000, 2001, 2002, 2003]
    for name, own in by_variant.items():
        assert [row["seed"] for row in own] == seeds
        info = read_picture_info(folder / own[0]["file"])
        assert (info.seed, info.prompt) == (1000, PROMPTS[0])
        assert [adapter.scales for adapter in info.adapters.values()] == SCALES[name]


def test_the_table_names_every_score_that_is_defined(shown: str) -> None:
    header, *rows = shown.splitlines()
    for title in VARIANTS.values():
        assert title in header
    assert re.match(r"CLIP-I, generated( +-?0\.\d{3}){5}$", rows[0])
    assert re.match(r"vs\. real pictures( +-?0\.\d{3} to 0\.\d{3}){5}$", rows[1])
    assert any(row.startswith("DIV, among pictures ") for row in rows)
    assert "DINO" not in shown
    assert "report.html" in shown


def test_the_verdict_stands_below_the_table_and_on_the_page(shown: str, folder: Path) -> None:
    below = " ".join(shown.split("\n\n")[1].split())
    assert below.startswith("The subject ")
    assert "Stage II alone" in below
    assert f'<p class="verdict">{escape(below)}</p>' in (folder / "report.html").read_text()


class Page(HTMLParser):
    """The tags of a page that refer to anything, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_stands_alone(folder: Path, scores: dict[str, Any]) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.tags.count("img") == len(scores["pictures"]) == len(page.references)
    assert all(each.startswith("data:image/jpeg;base64,") for each in page.references)
    assert not {"script", "link", "iframe", "base"} & set(page.tags)
    assert "b" not in page.tags  # the prompt's own tag is text
    styles = re.findall(r"url\((.{16})", text)
    assert len(styles) == 6
    assert set(styles) == {"data:image/jpeg;"}
    assert "@import" not in text
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    for part in (*PROMPTS, *VARIANTS.values(), "seed 2000", "nearest 0."):
        assert part in page.text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert len(text) < 2_000_000


def test_from_python_the_same_figures_come_back(recipe: Recipe, scores: dict[str, Any]) -> None:
    report = evaluate(recipe, {str(recipe.folder / "adapters"): 0.0})
    assert isinstance(report, EvaluationReport)
    found = report.as_json()["variants"]
    assert list(found) == ["base", "fine_tuned"]
    # by a scale of 0 nothing changes
    assert found["base"] == found["fine_tuned"]
    known = scores["variants"]["base"]
    assert found["base"]["clip_t"]["value"] == pytest.approx(known["clip_t"]["value"], abs=1e-6)
    assert report.changes["fine_tuned"]["clip_i"].value == 0  # type: ignore[union-attr]


def test_a_later_evaluation_replaces_the_earlier_one(
    recipe_file: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["evaluation.prompts=[a sks octopus]", "evaluation.other_prompts=[]"]
    few = [
        "evaluation.class_prompts=[]",
        "evaluation.pictures_per_prompt=1",
        f"runs_dir={tmp_path}",
    ]
    folder = tmp_path / recipe.name / "evaluation"
    folder.mkdir(parents=True)
    (folder / "scores.json").touch()
    (folder / "old.png").touch()
    main([str(recipe_file), *one, *few, "--adapters"])
    assert "fine-tuned" not in capsys.readouterr().out
    names = {str(file.relative_to(folder)) for file in folder.rglob("*.*")}
    pictures = "pictures/base/000-a-sks-octopus-seed1000.png"
    assert names == {"scores.json", "report.html", pictures}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapters", "nowhere"], "nowhere has no exported adapter"),
        (["--adapters", "a=b"], "'a=b' ends in 'b', which is not a scale"),
        (["evaluation.clip=/nowhere/clip"], "evaluation.clip must name a CLIP model"),
        (["evaluation.dino=/nowhere/dino"], "evaluation.dino must name a DINO or DINOv2 model"),
        (["--adapters", "a", "seed=-1"], "seed: Input should be greater than or equal to 0"),
        (["--adapters", "a=0.5", "a=1"], "--adapters must name different adapters (got a twice)"),
        (["--reference", str(ROOT / "recipes")], "two pictures or more, but"),
        (["evaluation=null"], "needs an `evaluation` section"),
        (["data.source=/nowhere/pictures"], "/nowhere/pictures"),
        (["name=untrained"], "train the recipe first"),
    ],
)
def test_mistakes_are_found_before_anything_is_drawn(
    arguments: list[str],
    said: str,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("finetune.evaluation.measurement.draw_variants", None)
    with pytest.raises(SystemExit, match="2"):
        main([str(recipe_file), *arguments])
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_folder_of_something_else_stays_as_it_is(
    recipe_file: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / recipe.name / "evaluation" / "holiday.png"
    own.parent.mkdir(parents=True)
    own.touch()
    with pytest.raises(SystemExit, match="2"):
        main([str(recipe_file), f"runs_dir={tmp_path}", "--adapters"])
    assert "is no earlier evaluation" in capsys.readouterr().err
    assert own.exists()


def test_scales_are_read_from_the_command_line() -> None:
    assert read_adapters(None) is None
    assert read_adapters([]) == {}
    assert read_adapters(["a", "b=0.5", "c=1:0.5,2:0"]) == {"a": 1.0, "b": 0.5, "c": {1: 0.5, 2: 0}}
    for twice in (["a=0.5", "a=1"], ["a", "b", "./a/"]):
        with pytest.raises(UserError, match="must name different adapters"):
            read_adapters(twice)


@pytest.mark.parametrize(
    ("place", "said"),
    [("nowhere", "nowhere is not there"), ("0.png", "0.png is a file"), ("", "0.png cannot be")],
)
def test_a_mistaken_reference_is_found_before_anything_is_drawn(
    place: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("finetune.evaluation.measurement.draw_variants", None)
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [f"cache_dir={tmp_path / 'cache'}"])
    with pytest.raises(UserError, match=said):
        evaluate(recipe, {}, reference=tmp_path / place)


@pytest.mark.parametrize(
    ("stages", "variants", "said"),
    [
        ("apart", ("base", "fine_tuned"), True),
        ("apart", ("base", "fine_tuned", "stage_1", "stage_2"), False),
        ("together", ("base", "fine_tuned"), False),
    ],
)
def test_stages_that_cannot_be_told_apart_are_spoken_of(
    stages: str, variants: tuple[str, ...], said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = SimpleNamespace(
        variants=dict.fromkeys(variants),
        save=lambda folder: folder,
        table=lambda: "scores",
        explain_intervals=lambda: "of few they say little",
    )
    monkeypatch.setattr("finetune.evaluation.verdict.write_verdict", lambda _: "It is learnt.")
    monkeypatch.setattr("finetune.evaluation.measurement.evaluate", lambda *_, **__: report)
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", ["name=nothing"])
    options = Namespace(adapters=None, stages=stages, reference=None)
    assert ("not apart" in evaluate_and_save(recipe, options)) == said


def test_one_training_picture_leaves_the_ceiling_undefined(recipe: Recipe) -> None:
    draw = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    folder = Path(recipe.cache_dir).parent / "one"
    folder.mkdir()
    Image.fromarray(draw).save(folder / "one.png")
    tree = recipe.model_dump()
    tree["data"] |= {"source": str(folder), "prompt": "a sks octopus"}
    tree["evaluation"] |= {"prompts": ["a sks octopus"], "pictures_per_prompt": 1}
    tree["evaluation"] |= {"other_prompts": [], "class_prompts": []}
    report = evaluate(Recipe.model_validate(tree), {})
    assert set(report.ceiling.values()) == {None}
    assert report.table().splitlines()[1].endswith("-")
    with pytest.raises(UserError, match="is no earlier evaluation"):
        report.save(folder)


def test_a_runs_own_recipe_needs_no_more_words(
    recipe: Recipe, folder: Path, scores: dict[str, Any]
) -> None:
    """This test is the last, as it replaces the evaluation that the others look at."""
    before = (folder / "scores.json").stat().st_ino
    main([str(recipe.folder / "recipe.yaml")])
    assert (folder / "scores.json").stat().st_ino != before
    again = json.loads((folder / "scores.json").read_text())
    assert list(again["variants"]) == ["base", "fine_tuned"]
    assert again["variants"]["base"] == scores["variants"]["base"] | {
        "frechet": again["variants"]["base"]["frechet"]
    }
