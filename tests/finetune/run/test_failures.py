"""What the system refuses is a sentence."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adapters.errors import UserError
from finetune.run.checkpoints import save_checkpoint
from finetune.run.failures import explain, name_newest, say_how_to_go_on
from finetune.run.folders import Folders
from finetune.run.stopping import Stop, StoppedError
from finetune.step.stages import STAGES
from finetune.train import in_sentences
from tests.builders.disks import small_disk
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import recipe_of, train

CPU = torch.device("cpu")


def refuse_memory(folder: Path) -> None:
    torch.empty(2**58)


def refuse_memory_to_numpy(folder: Path) -> None:
    np.empty(2**58)


def read_a_picture_that_is_gone(folder: Path) -> None:
    np.load(folder / "picture.npy", mmap_mode="r")


def write_into_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    save_file({"a": torch.zeros(1)}, folder / "file" / "adapter.safetensors")


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (refuse_memory, r"The system refuses more main memory \(.*allocate.*smaller batch_size"),
        (refuse_memory_to_numpy, r"The system refuses more main memory \(Unable to allocate"),
        (read_a_picture_that_is_gone, r"reported an error \(.*No such file.*picture\.npy"),
        (write_into_a_file, r"reported an error \("),
    ],
)
def test_an_error_of_the_system_is_a_sentence(
    tmp_path: Path, random_cascade: RandomCascade, work: object, words: str
) -> None:
    assert callable(work)
    recipe = recipe_of(random_cascade, tmp_path)
    newest = save_checkpoint(Folders(recipe.folder).checkpoints(STAGES[1]), 2, {"step": 2}, keep=1)
    with pytest.raises(UserError, match=words) as caught, in_sentences(recipe, CPU, Stop()):
        work(tmp_path)
    assert str(caught.value).endswith(f"The newest checkpoint is {newest}.")


def test_a_defect_keeps_its_traceback(tmp_path: Path, random_cascade: RandomCascade) -> None:
    assert explain(ZeroDivisionError("division by zero")) is None
    recipe = recipe_of(random_cascade, tmp_path)
    with pytest.raises(ZeroDivisionError), in_sentences(recipe, CPU, Stop()):
        raise ZeroDivisionError


def test_errors_after_a_request_to_stop_are_its_consequences(
    tmp_path: Path, random_cascade: RandomCascade
) -> None:
    stop = Stop()
    stop.signal = 15
    recipe = recipe_of(random_cascade, tmp_path)
    with pytest.raises(StoppedError, match="SIGTERM"), in_sentences(recipe, CPU, stop):
        raise RuntimeError("Connection closed by peer")


def test_a_full_disk_ends_a_run_with_its_last_whole_checkpoint(
    tmp_path: Path, random_cascade: RandomCascade
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    recipe = recipe_of(random_cascade, tmp_path, stage={"steps": 500})
    with small_disk(runs, "2M"):
        with (
            pytest.raises(UserError, match="No space left on device") as caught,
            in_sentences(recipe, CPU, Stop()),
        ):
            train(recipe)
        assert re.search(r"The newest checkpoint is \S+/step-\d{6}\.$", str(caught.value))


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "run")
    assert name_newest(folders) == ""
    assert say_how_to_go_on(folders).startswith("the same command starts again")
    newest = save_checkpoint(folders.checkpoints(STAGES[2]), 7, {}, keep=1)
    assert say_how_to_go_on(folders) == f"the same command goes on from {newest}."
