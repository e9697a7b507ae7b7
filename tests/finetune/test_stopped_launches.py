"""Runs that are stopped as users and schedulers stop them, through Accelerate's launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.builders import ROOT
from tests.builders.commands import heed_interrupts
from tests.builders.killed_runs import run_folder, save_pictures, save_recipe
from tests.builders.random_cascade import RandomCascade


@contextmanager
def launched(recipe: Path, processes: int) -> Iterator[subprocess.Popen[str]]:
    """Launch a run as the README does, in a process group of its own."""
    launcher = ["accelerate.commands.launch", "--quiet", "--config_file", "accelerate_config.yaml"]
    if processes > 1:
        launcher += ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "finetune.train", str(recipe)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "ACCELERATE_USE_CPU": "true"},
    )
    try:
        yield process
    finally:
        process.kill()


def newest_step(recipe: Path) -> int:
    """The step of the newest checkpoint of Stage I."""
    saved = (run_folder(recipe) / "checkpoints" / "stage_1").glob("step-*")
    return max((int(each.name.removeprefix("step-")) for each in saved), default=0)


def trainers(recipe: Path) -> list[int]:
    """The numbers of the processes that train a recipe."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes()
        except OSError:
            continue
        if str(recipe).encode() in command and b"launch" not in command:
            found.append(int(place.name))
    return found


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_all_processes_stop_after_the_same_step_and_none_is_left(
    random_cascade: RandomCascade, tmp_path: Path, number: int, processes: int
) -> None:
    """By Ctrl-C, which the terminal sends to all, and by SIGTERM to the launcher alone."""
    pictures = save_pictures(tmp_path / "pictures")
    settings = {"steps": 100_000, "keep_checkpoints": 1}
    recipe = save_recipe(tmp_path, random_cascade, pictures, "run", **settings)
    with launched(recipe, processes) as process:
        while newest_step(recipe) < 2:
            assert process.poll() is None
            time.sleep(0.2)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
        said = process.communicate()[0]
    deadline = time.monotonic() + 30
    while trainers(recipe) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert trainers(recipe) == []
    name = signal.Signals(number).name
    newest = run_folder(recipe) / "checkpoints" / "stage_1" / f"step-{newest_step(recipe):06d}"
    sentence = f"stopped by {name}: the same command goes on from {newest}."
    assert said.count(sentence) == 1
    if processes == 1:  # PyTorch's launcher has words of its own
        assert "Traceback" not in said.partition(sentence)[2]
    assert (run_folder(recipe) / ".running").read_text() == ""
