"""What a run continues with: the same content, at the same learning rates."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from adapters.errors import UserError
from finetune.run.checkpoints import list_checkpoints, load_checkpoint
from finetune.run.folders import Folders
from finetune.run.identity import check_content, check_schedule, find_differences
from finetune.step.stages import STAGES
from finetune.train import main
from tests.builders.commands import refusal
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import recipe_of

pytestmark = pytest.mark.usefixtures("no_plan")

STEPS = 2


@pytest.fixture(scope="module")
def begun(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, captioned pictures, a recipe, and its run after two steps."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(random_cascade.stage_1, folder / "base")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{index}.png")
        (folder / "data" / f"{index}.txt").write_text(f"a photo of {index}")
    recipe = recipe_of(random_cascade, folder, stage={"steps": STEPS, "batch_size": 2})
    base = recipe.base.model_copy(update={"stage_1": str(folder / "base"), "stage_2": None})
    data = recipe.data.model_copy(update={"source": str(folder / "data"), "prompt": None})
    recipe = recipe.model_copy(update={"base": base, "data": data})
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    main([str(folder / "recipe.yaml")])
    return folder


def change_a_picture(folder: Path) -> None:
    file = folder / "data" / "1.png"
    pixels = np.asarray(Image.open(file)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(file)


def remove_a_picture(folder: Path) -> None:
    for suffix in (".png", ".txt"):
        (folder / "data" / f"2{suffix}").unlink()


def change_a_caption(folder: Path) -> None:
    (folder / "data" / "1.txt").write_text("a photo of something else")


def change_a_weight(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (file,) = (folder / "base" / part).glob("*.safetensors")
        tensors = load_file(file)
        tensors[min(tensors)].view(-1)[0] += 1
        save_file(tensors, file, {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_a_picture, "the pictures differ"),
        (remove_a_picture, "the pictures, the captions differ"),
        (change_a_caption, "the captions differ"),
        (change_a_weight("unet"), "the weights of base.stage_1 differ"),
        (change_a_weight("text_encoder"), "the text encoder differ"),
    ],
)
def test_other_content_is_refused_by_name(
    begun: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = tmp_path / "saved"
    shutil.copytree(begun, saved)
    try:
        change(begun)
        for steps in (STEPS, STEPS + 1):  # the run is finished, and is to go on
            said = refusal(capsys, main, begun / "recipe.yaml", f"stage_1.steps={steps}")
            assert f"step-00000{STEPS} was trained with other content: {named}." in said
    finally:
        shutil.rmtree(begun)
        shutil.copytree(saved, begun)


def test_the_same_content_elsewhere_continues(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that were only touched, a cache that is gone, and twice as many smaller batches."""
    folder = tmp_path / "copy"
    shutil.copytree(begun / "runs", folder / "runs")
    for file in (begun / "data").iterdir():
        file.touch()
    main(
        [
            *(str(begun / "recipe.yaml"), f"stage_1.steps={STEPS + 1}", f"runs_dir={folder}/runs"),
            *(f"cache_dir={folder}/cache", "stage_1.batch_size=1", "stage_1.accumulation=2"),
        ]
    )
    assert "warning" not in capsys.readouterr().out
    saved = list_checkpoints(Folders(folder / "runs" / "run").checkpoints(STAGES[1]))
    assert load_checkpoint(saved[-1])["step"] == STEPS + 1


def test_another_setting_is_named_with_both_values(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, main, begun / "recipe.yaml", "stage_1.adapter.rank=3", "seed=5")
    assert "another recipe (seed is 5, was 0, stage_1.adapter.rank is 3, was 2)" in said


def test_fewer_steps_than_were_trained_are_said(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    main([str(begun / "recipe.yaml"), f"stage_1.steps={STEPS - 1}"])
    warning, already = capsys.readouterr().out.splitlines()
    assert f"trained for {STEPS} steps and not {STEPS - 1}" in warning
    assert already.startswith("Already trained")
    shutil.rmtree(begun / "runs" / "run" / "adapters")
    main([str(begun / "recipe.yaml"), f"stage_1.steps={STEPS - 1}"])
    assert f"what is exported has been trained for {STEPS}." in capsys.readouterr().out


CONTENT: dict[str, Any] = {
    "the pictures": "a",
    "the pictures of a step": 8,
    "processes": 2,
    "accumulation": 1,
}


def check(**now: Any) -> str | None:
    place = Path("step-1")
    return check_content(CONTENT | now, CONTENT, place, Path("runs/run"), "stage_1")


def test_other_processes_must_take_as_many_pictures() -> None:
    assert check() is None
    said = check(processes=1, accumulation=2)
    assert said is not None
    assert "by 1 in place of 2 processes with as many pictures of a step, 8" in said
    with pytest.raises(UserError, match=r"\(8 before, 4 now; stage_1.accumulation=2 makes them 8"):
        check(**{"processes": 1, "the pictures of a step": 4})


@pytest.mark.parametrize(
    ("schedule", "warmup", "step", "steps", "differs"),
    [
        ("constant", 0, 5, 20, False),
        ("cosine", 0, 5, 20, True),
        ("cosine", 0, 5, 8, True),
        ("cosine", 5, 5, 20, False),  # still warming up
        ("linear", 0, 5, 20, True),
        ("one_cycle", 0, 5, 20, True),
        ("cosine", 0, 5, 10, False),
        ("cosine", 0, 5, 4, False),  # nothing is left to train
    ],
)
def test_other_steps_under_a_schedule_that_follows_them_need_force(
    schedule: str, warmup: int, step: int, steps: int, differs: bool
) -> None:
    def check() -> None:
        check_schedule(schedule, warmup, step, steps, 10, section="stage_1")

    if differs:
        with pytest.raises(UserError, match=f"stage_1.steps is {steps}, but .* --force"):
            check()
    else:
        check()


def test_differences_are_listed_field_by_field() -> None:
    now = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": "x" * 100}
    assert find_differences(now, now) == []
    then = {"a": {"b": 2, "c": [1, 2], "old": True}, "e": "y"}
    shown = '"' + "x" * 59 + "…"
    assert find_differences(now, then) == [
        "a.b is 1, was 2",
        "a.old is null, was true",
        f'e is {shown}, was "y"',
    ]
