"""From a folder of pictures to a recipe and the crops that it trains on."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import init
from finetune.data.batches import Batches, picture_at
from finetune.data.pictures import load_pictures, to_tensor
from finetune.proposal.crops import CROPS, draw_crops
from finetune.recipe.file import load_recipe
from tests.builders.commands import refusal
from tests.builders.random_cascade import RandomCascade


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


def test_crops_are_those_of_training(
    photos: Path, random_cascade: RandomCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    init.main([str(photos), "--subject", "robot", "--base", str(random_cascade.stage_1.parent)])
    recipe = load_recipe("robot.yaml")
    pictures = load_pictures(recipe.data, recipe.cache, *recipe.crops_px)
    shown: list[list[Image.Image]] = []
    monkeypatch.setattr(
        "finetune.proposal.crops.contact_sheet", lambda rows, **_: shown.extend(rows)
    )
    draw_crops(recipe, pictures)
    for number, stage in enumerate(recipe.trained):
        training, size_px = recipe.training(stage), recipe.source(stage).picture_size_px
        batches = Batches(
            data=recipe.data,
            pictures=pictures,
            class_pictures=(),
            prior=recipe.prior,
            prompt_embeds={"a sks robot": torch.zeros(1), "": torch.zeros(1)},
            batch_size=training.batch_size,
            size_px=size_px,
            low_res_px=None,
            noise_level=(0, 0),
            num_train_timesteps=1000,
            seed=recipe.seed,
        )
        trained: list[list[torch.Tensor]] = [[] for _ in pictures]
        for position in range(CROPS * len(pictures)):
            step, place = divmod(position, batches.instance_count)
            which = picture_at(position, len(pictures), recipe.seed)
            trained[which].append(batches.example(step, place)["pixels"])
        for row, own in zip(shown, trained, strict=True):
            drawn = row[1 + number * CROPS :][:CROPS]
            assert all(torch.equal(to_tensor(a), b) for a, b in zip(drawn, own, strict=True))
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_it_asks_only_for_what_is_missing(
    photos: Path, random_cascade: RandomCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal("\nrobot\n"))
    monkeypatch.setattr(sys, "stderr", asked)
    init.main([str(photos), "--base", str(random_cascade.stage_1.parent)])
    assert load_recipe("robot.yaml").evaluation.subject == "robot"  # type: ignore[union-attr]
    assert asked.getvalue().count("?") == 2, "again after an empty answer, and nothing else"
