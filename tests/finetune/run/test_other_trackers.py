"""Trackers beside TensorBoard get the same curves and pictures, and cannot stop a run."""

import json
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from adapters.errors import UserError
from finetune.recipe.file import load_recipe
from finetune.recipe.schema.recipe import TrackerName
from finetune.run.other_trackers import check_trackers
from tests.builders.random_cascade import RandomCascade
from tests.builders.recipes import SMALL, write
from tests.builders.small_runs import exported, logged, recipe_of, train


class FileTracker(GeneralTracker):
    """A tracker that writes all it is told to a file, one in a row."""

    name = "file"
    requires_logging_directory = True
    runs: ClassVar[list[Path]] = []

    def __init__(self, run_name: str, logging_dir: str) -> None:
        self.file = Path(logging_dir) / f"{run_name}.jsonl"
        self.runs.append(self.file)
        super().__init__()

    @property
    def tracker(self) -> Path:
        return self.file

    def _tell(self, **row: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._tell(config=values)

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self._tell(step=step, values=values)

    def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._tell(step=step, sizes={tag: each[0].size for tag, each in values.items()})

    def finish(self) -> None:
        self._tell(finished=True)


class Offline(FileTracker):
    """A tracker whose server cannot be reached."""

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        raise ConnectionError("no route to the server")


def test_the_names_are_accelerates() -> None:
    known = {str(name) for name in LoggerType} - {"all"}
    assert {*get_args(TrackerName)} == known == {*LOGGER_TYPE_TO_CLASS}


def test_they_get_what_tensorboard_gets(
    random_cascade: RandomCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", FileTracker)
    validation = {"prompts": ["a cat"], "through_stage_2": "never", "every": 2}
    sampling = {"stage_1": {"steps": 2}}
    recipe = recipe_of(
        random_cascade,
        tmp_path,
        validation=validation | {"sampling": sampling},
        trackers=["tensorboard", "wandb"],
    )
    train(recipe)
    file = FileTracker.runs[-1]
    assert file.name == f"{recipe.name}-stage_1.jsonl"
    first, *rows, last = map(json.loads, file.read_text().splitlines())
    assert first["config"]["stage_1.optimizer.learning_rate"] == 1e-3
    assert last == {"finished": True}
    losses = {row["step"]: row["values"]["loss"] for row in rows if "loss" in row.get("values", ())}
    assert [*losses] == [1, 2, 3, 4]
    assert [*losses.values()] == pytest.approx(logged(recipe, "loss"))
    drawn = [row for row in rows if "sizes" in row]
    assert [row["step"] for row in drawn if "drawn/samples" in row["sizes"]] == [0, 2, 4]


def test_one_that_fails_is_given_up(
    random_cascade: RandomCascade,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Offline)
    recipe = recipe_of(random_cascade, tmp_path / "one", trackers=["tensorboard", "wandb"])
    train(recipe)
    said = capsys.readouterr().out
    assert said.count("the tracker wandb failed (no route to the server)") == 1
    assert len(logged(recipe, "loss")) == 4
    plain = recipe_of(random_cascade, tmp_path / "two")
    for name, tensor in train(plain).items():
        assert torch.equal(tensor, exported(recipe)[name])


def test_mistakes_are_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="package of nothing_like_it is not installed: run `pip"):
        check_trackers(["json", "nothing_like_it"])
    for given, said in (
        ("[wandb]", "must begin with tensorboard"),
        ("[]", "must begin with tensorboard"),
        ("[tensorboard, wandb, wandb]", "must name each tracker once"),
        ("[tensorboard, wandbb]", "(got 'wandbb')"),
    ):
        with pytest.raises(UserError) as error:
            load_recipe(write(tmp_path, f"{SMALL}trackers: {given}\n"))
        assert said in str(error.value)
    assert load_recipe(write(tmp_path, SMALL)).trackers == ("tensorboard",)
