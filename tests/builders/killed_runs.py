"""Whole runs that are killed at random moments, until they have come to their end.

Such a run encodes captions, draws class pictures, trains both stages of a random cascade, validates
and exports.
"""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adapters.files.places import PEFT_WEIGHTS
from tests.builders.random_cascade import RandomCascade

STAGES = ("stage_1", "stage_2")
FEW = {stage: {"steps": 1} for stage in STAGES}
ENDS_WITHIN_S = 300.0
"""The seconds that a process has to end after a signal."""


class Process(Protocol):
    """A run at work."""

    def wait(self, seconds: float) -> int | None:
        """Wait for its end; ``None``: it has not ended within the seconds."""

    def send(self, number: int) -> None:
        """Send it a signal, in a way of its own."""


Start = Callable[[Path], Process]
"""Starts a run of a recipe."""


def save_pictures(folder: Path, count: int = 2) -> Path:
    """Save random pictures."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def save_recipe(
    folder: Path, cascade: RandomCascade, pictures: Path, name: str, **training: Any
) -> Path:
    """Save the recipe of a run, whose folder and cache are in ``folder``.

    ``training`` are settings of both stages' sections.
    """
    stage = {
        "steps": 3,
        "batch_size": 2,
        "adapter": {"rank": 2},
        "optimizer": {"name": "adamw_8bit", "learning_rate": 1e-2},
        "checkpoint_every": 1,
        **training,
    }
    recipe = {
        "name": name,
        "base": {"stage_1": str(cascade.stage_1), "stage_2": str(cascade.stage_2)},
        "data": {"source": str(pictures), "prompt": "a photo of a sks dog"},
        "prior": {"prompts": ["a photo of a dog"], "count": 2, "sampling": FEW},
        **dict.fromkeys(STAGES, stage),
        "validation": {
            "prompts": ["a sks dog"],
            "every": 2,
            "loss_pictures": 1,
            "sampling": FEW,
        },
        "log_every": 1,
        "runs_dir": str(folder / "runs"),
        "cache_dir": str(folder / f"cache-{name}"),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_folder(recipe: Path) -> Path:
    """The folder of a recipe's run."""
    return recipe.parent / "runs" / recipe.stem


def all_that_is_left(run: Path) -> dict[str, object]:
    """The adapters, and what TensorBoard shows but times, memory and the folders in the recipe."""
    left: dict[str, object] = {}
    for stage in STAGES:
        for name, tensor in load_file(run / "adapters" / stage / PEFT_WEIGHTS).items():
            left[f"{stage}: {name}"] = tensor.tolist()
        events = EventAccumulator(
            str(run / "logs" / stage), size_guidance={"images": 0, "scalars": 0, "tensors": 0}
        )
        events.Reload()
        tags = events.Tags()
        for tag in tags["scalars"]:
            if not tag.startswith("speed/"):
                left[f"{stage}: {tag}"] = [(p.step, p.value) for p in events.Scalars(tag)]
        for tag in tags["images"]:
            shown = [(p.step, p.encoded_image_string) for p in events.Images(tag)]
            left[f"{stage}: {tag}"] = shown
        for tag in tags["tensors"]:
            # unlike TensorBoard itself, this accumulator keeps texts that a later start replaces
            left[f"{stage}: {tag}"] = sorted({p.step for p in events.Tensors(tag)})
    return left


@dataclass
class Kills:
    """Kills at random moments of runs of one recipe.

    Args:
        start: starts a run.
        recipe: the recipe.
        expected: what a run leaves that nothing kills.
        seconds: its time, from which the moments are drawn.
        rng: draws the moments and the signals.
        weights: the signals, and how often each is drawn.
    """

    start: Start
    recipe: Path
    expected: Mapping[str, object]
    seconds: float
    rng: np.random.Generator
    weights: Mapping[int, float] = field(default_factory=lambda: {signal.SIGKILL: 1.0})
    kills: int = 0
    finished: int = 0
    trouble: list[str] = field(default_factory=list)
    """What went wrong."""

    def kill_once(self) -> None:
        """Start or continue the run, and kill it after a while; if it ends before, look at it."""
        process = self.start(self.recipe)
        status = process.wait(self.rng.uniform(0, self.seconds))
        if status is None:
            numbers = list(self.weights)
            number = int(self.rng.choice(numbers, p=list(self.weights.values())))
            process.send(number)
            self.kills += 1
            if process.wait(ENDS_WITHIN_S) is None:
                self.trouble.append(f"did not end after {signal.Signals(number).name}")
            return
        self._look(status)

    def finish(self) -> None:
        """Bring the run to its end, and look at what it leaves."""
        self._look(self.start(self.recipe).wait(ENDS_WITHIN_S))

    def _look(self, status: int | None) -> None:
        """Compare a finished run with what is expected, and make room for the next."""
        if status != 0:
            self.trouble.append(f"ended with {status}")
            return
        run, self.finished = run_folder(self.recipe), self.finished + 1
        left = all_that_is_left(run)
        differing = [
            name
            for name in sorted(left.keys() | self.expected.keys())
            if left.get(name) != self.expected.get(name)
        ]
        if differing:
            self.trouble.append(f"other than expected: {', '.join(differing[:5])}")
        run.rename(run.with_name(f"{run.name}-{self.finished}"))


def measure(start: Start, recipe: Path) -> tuple[dict[str, object], float]:
    """Run a recipe that nothing kills; return what it leaves, and its time in seconds."""
    began = time.monotonic()
    status = start(recipe).wait(ENDS_WITHIN_S)
    assert status == 0, f"{recipe} ended with {status}"
    return all_that_is_left(run_folder(recipe)), time.monotonic() - began
