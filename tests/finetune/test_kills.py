"""Runs that are killed again and again come to the same end."""

import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from tests.builders.killed_runs import Kills, measure, save_pictures, save_recipe
from tests.builders.random_cascade import RandomCascade

KILLS = 30


def train(recipe: Path) -> None:
    """Train as the command does, with its output in a file."""
    with recipe.with_suffix(".log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import torch

    from finetune.train import main

    torch.set_num_threads(1)
    torch.set_num_threads = lambda number: None  # type: ignore[assignment]
    main([str(recipe)])
    sys.exit(0)


class Child:
    """A run in a process that has the libraries imported already."""

    def __init__(self, process: BaseProcess) -> None:
        self.process = process
        process.start()

    def wait(self, seconds: float) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode

    def send(self, number: int) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)


@pytest.mark.timeout(900)  # about 130 s on an idle core, and more beside other tests
def test_a_run_killed_thirty_times_is_the_one_that_was_not(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    """In every phase: the moments are spread over a whole run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune.train", "tests.builders.killed_runs_imports"])
    pictures = save_pictures(tmp_path / "pictures")

    def start(recipe: Path) -> Child:
        return Child(context.Process(target=train, args=(recipe,)))

    straight = save_recipe(tmp_path, random_cascade, pictures, "straight")
    expected, seconds = measure(start, straight)
    recipe = save_recipe(tmp_path, random_cascade, pictures, "killed")
    weights = {signal.SIGKILL: 0.8, signal.SIGTERM: 0.2}
    rng = np.random.default_rng(0)
    killed = Kills(start, recipe, expected, seconds / 4, rng, weights)
    while killed.kills < KILLS:
        killed.kill_once()
    killed.finish()
    assert killed.trouble == []
    assert killed.finished > 0
