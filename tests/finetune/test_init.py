"""From a folder of pictures to a recipe and the crops that it trains on."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from finetune import init
from finetune.data.batches import Batches, derived_seed, picture_at
from finetune.data.pictures import load_pictures, to_tensor
from finetune.proposal.crops import CROPS, draw_crops
from finetune.proposal.recipe_text import Answers, propose
from finetune.proposal.survey import survey
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import OutputPrior
from finetune.run.stage_run import Material, train_stage
from tests.builders.commands import refusal
from tests.builders.random_cascade import TEXT_WIDTH, RandomCascade


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "my photos"
    folder.mkdir()
    for number in range(3):
        source = Image.open(f"datasets/robot/0{number}.png").convert("RGB")
        source.resize((100 + 20 * number, 80)).save(folder / f"IMG_{number}.jpg")
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_folder_becomes_a_recipe(
    photos: Path, random_cascade: RandomCascade, capsys: pytest.CaptureFixture[str]
) -> None:
    init.main([str(photos), "--subject", "Robot toy", "--base", str(random_cascade.stage_1.parent)])
    shown = capsys.readouterr().out
    recipe = load_recipe("robot_toy.yaml")
    assert (recipe.name, recipe.data.source) == ("robot_toy", str(photos))
    assert recipe.data.prompt == "a sks Robot toy"
    assert recipe.base.stage_2 == str(random_cascade.stage_2)
    assert "3 in" in shown
    assert "Main memory in training" in shown
    command = f"{init.LAUNCH} robot_toy.yaml"
    assert shown.rstrip().endswith(command)
    assert Path("robot_toy.yaml").read_text().startswith(f"# {command}\n")
    sheet = Image.open("robot_toy.crops.png")
    assert min(sheet.size) > 200
    assert "already exists" in refusal(
        capsys, init.main, photos, "--subject", "Robot toy", "--base", random_cascade.stage_1.parent
    )


@pytest.fixture
def no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that the plan takes."""
    monkeypatch.setattr(init, "describe_memory", lambda *_: "")


@pytest.mark.usefixtures("no_plan")
def test_crops_are_those_of_training(
    photos: Path, random_cascade: RandomCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    init.main([str(photos), "--subject", "robot", "--base", str(random_cascade.stage_1.parent)])
    few = ["stage_1.steps=3", "stage_2.steps=9", "validation={loss_pictures: 0}"]
    small = ["stage_1.adapter={rank: 1}", "stage_2.adapter={rank: 1}"]
    named = ["data.prompt=a robot", "evaluation=null"]
    recipe = load_recipe("robot.yaml", [*few, *small, *named])
    pictures = load_pictures(recipe.data, recipe.cache, *recipe.crops_px)
    shown: list[list[Image.Image]] = []
    monkeypatch.setattr(
        "finetune.proposal.crops.contact_sheet", lambda rows, **_: shown.extend(rows)
    )
    draw_crops(recipe, pictures)

    trained: dict[tuple[int, int, int], torch.Tensor] = {}
    example = Batches.example

    def record(batches: Batches, step: int, place: int) -> dict[str, torch.Tensor]:
        made = example(batches, step, place)
        trained[batches.size_px, step, place] = made["pixels"]
        return made

    monkeypatch.setattr(Batches, "example", record)
    assert isinstance(recipe.prior, OutputPrior)
    texts = ["", "a robot", *recipe.prior.list_captions()]
    material = Material(pictures, [], {text: torch.zeros(7, TEXT_WIDTH) for text in texts})
    for number, (stage, in_a_step) in enumerate(zip(recipe.trained, (3, 1), strict=True)):
        train_stage(recipe, stage, material, Accelerator(cpu=True))
        size_px, seed = recipe.source(stage).picture_size_px, derived_seed(recipe.seed, number + 1)
        own: list[list[torch.Tensor]] = [[] for _ in pictures]
        for position in range(CROPS * len(pictures)):
            which = picture_at(position, len(pictures), seed)
            own[which].append(trained[size_px, *divmod(position, in_a_step)])
        for row, crops in zip(shown, own, strict=True):
            drawn = row[1 + number * CROPS :][:CROPS]
            assert all(torch.equal(to_tensor(a), b) for a, b in zip(drawn, crops, strict=True))
    wide = shown[2]
    assert not np.array_equal(np.asarray(wide[1]), np.asarray(wide[2])), "the crop shifts"


def test_without_a_terminal_it_never_asks(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --subject" in refusal(capsys, init.main, photos, "--memory", "16GB")
    if not torch.cuda.is_available():
        assert "--memory 16GB" in refusal(capsys, init.main, photos, "--subject", "dog")
    assert "--memory must be" in refusal(
        capsys, init.main, photos, "--subject", "dog", "--memory", "much"
    )
    assert "is not a folder" in refusal(capsys, init.main, photos / "none", "--subject", "dog")
    assert "must be a folder with stage_1" in refusal(
        capsys, init.main, photos, "--subject", "dog", "--base", photos
    )
    assert not list(Path().glob("*.yaml"))


def test_a_copy_of_a_published_base_is_no_small_one(
    photos: Path, random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "copy"
    for stage in ("stage_1", "stage_2"):
        shutil.copytree(random_cascade.stage_1.parent / stage, base / stage)
    config = base / "stage_1" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"encoder_hid_dim": 4096}))
    assert init.is_small(str(random_cascade.stage_1.parent))
    assert not init.is_small(str(base))
    if not torch.cuda.is_available():
        said = refusal(capsys, init.main, photos, "--subject", "dog", "--base", base)
        assert "--memory 16GB" in said
    found = survey(photos, tmp_path / "cache", 16)
    recipe = propose(found, Answers(subject="dog", base=str(base))).recipe
    assert recipe.stage_1 is not None
    assert recipe.stage_1.steps == 1000, "as for the published models"
    assert recipe.base.stage_1 == str(base / "stage_1")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("no_plan")
def test_in_a_terminal_it_asks_only_for_what_is_missing(
    photos: Path, random_cascade: RandomCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal("\nrobot\n"))
    monkeypatch.setattr(sys, "stderr", asked)
    init.main([str(photos), "--base", str(random_cascade.stage_1.parent)])
    assert load_recipe("robot.yaml").evaluation.subject == "robot"  # type: ignore[union-attr]
    assert asked.getvalue().count("?") == 2, "again after an empty answer, and nothing else"
