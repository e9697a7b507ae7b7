"""Runs that are killed again and again come to the same end."""

import signal
from pathlib import Path

import numpy as np
import pytest

from tests.builders.killed_runs import Kills, measure, save_pictures, save_recipe
from tests.builders.processes import Child, train
from tests.builders.random_cascade import RandomCascade

KILLS = 30


def start(recipe: Path) -> Child:
    return Child(recipe.with_suffix(".log"), train, [str(recipe)])


@pytest.mark.timeout(900)  # about 130 s on an idle core, and more beside other tests
def test_a_run_killed_thirty_times_is_the_one_that_was_not(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    """In every phase: the moments are spread over a whole run."""
    pictures = save_pictures(tmp_path / "pictures")
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
