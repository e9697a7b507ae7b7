"""Kill whole runs at random moments, and compare what they leave with runs that nothing killed.

    python -m benchmarks.kills [--kills 200] [--seed 0] [--out FOLDER]

Each case is a form of launch, an optimizer, with and without an average and accumulation; its run
of both stages of a random cascade is killed again and again, and starts anew once it has come to
its end. The signals are SIGKILL, SIGTERM and SIGINT, sent to the trainers, to the launcher alone or
to all. Prints what differs, if anything does, and a table; writes ``kills.txt``. No GPU is used.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapters.tables import format_table
from benchmarks.machine import ROOT, write_report
from tests.builders.commands import heed_interrupts
from tests.builders.killed_runs import Kills, measure, save_pictures, save_recipe
from tests.builders.random_cascade import RandomCascade, save_random_cascade

LAUNCHER = ("accelerate.commands.launch", "--quiet", "--config_file", "accelerate_config.yaml")
SEVERAL = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
FORMS: Mapping[str, Sequence[str]] = {
    "python": ("finetune.train",),
    "launcher": (*LAUNCHER, "-m", "finetune.train"),
    "two processes": (*LAUNCHER, *SEVERAL, "-m", "finetune.train"),
}
"""The arguments of ``python -m``, by form of launch."""

TARGETS = ("trainers", "launcher", "all")
SIGNALS = {signal.SIGKILL: 0.6, signal.SIGTERM: 0.2, signal.SIGINT: 0.2}
HEADER = ("launched by", "training", "kills", "finished runs", "trouble")
LEFT_S = 60.0
"""The seconds that trainers have to end after their launcher."""


@dataclass(frozen=True)
class Case:
    """A way to launch, and settings of training."""

    form: str
    optimizer: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> dict[str, Any]:
        """The settings of both stages."""
        return {"optimizer": dict(self.optimizer), **self.settings}

    def __str__(self) -> str:
        return ", ".join([self.optimizer["name"], *(f"{k} {v}" for k, v in self.settings.items())])


EIGHT_BIT = {"name": "adamw_8bit", "learning_rate": 1e-2}
PRODIGY = {"name": "prodigy", "learning_rate": 1.0}
SCHEDULE_FREE = {"name": "schedule_free", "learning_rate": 1e-2}
CASES = (
    Case("python", EIGHT_BIT, {"ema_decay": 0.9}),
    Case("launcher", PRODIGY, {"accumulation": 2}),
    Case("two processes", EIGHT_BIT, {"accumulation": 2}),
    Case("launcher", SCHEDULE_FREE),
    Case("python", SCHEDULE_FREE, {"ema_decay": 0.9, "accumulation": 2}),
    Case("two processes", PRODIGY, {"ema_decay": 0.9}),
)


class Launched:
    """A launched run, which is sent its signals in a random one of :data:`TARGETS`."""

    def __init__(self, form: str, recipe: Path, rng: np.random.Generator) -> None:
        self.recipe, self.rng = recipe, rng
        with recipe.with_suffix(".log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *FORMS[form], str(recipe)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=heed_interrupts,
                env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            )

    def wait(self, seconds: float) -> int | None:
        """Wait for the end of the launcher and of all trainers."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        deadline = time.monotonic() + LEFT_S
        while self.find_trainers():
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        return status

    def send(self, number: int) -> None:
        """Send a signal to some of the processes."""
        trainers = self.find_trainers() or [self.process.pid]
        target = self.rng.choice(TARGETS)
        numbers = {
            "trainers": trainers,
            "launcher": [self.process.pid],
            "all": [self.process.pid, *trainers],
        }[target]
        for each in dict.fromkeys(numbers):
            try:
                os.kill(each, number)
            except ProcessLookupError:
                continue

    def find_trainers(self) -> list[int]:
        """Find the processes that train the recipe."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                command = (place / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(self.recipe) in command and b"accelerate" not in command:
                found.append(int(place.name))
        return found


def kill_case(
    case: Case, number: int, cascade: RandomCascade, folder: Path, kills: int, seed: int
) -> Kills:
    """Kill the run of a case some number of times, and bring it to its end."""
    rng, pictures = np.random.default_rng([seed, number]), folder / "pictures"

    def start(recipe: Path) -> Launched:
        return Launched(case.form, recipe, rng)

    def save(name: str) -> Path:
        return save_recipe(folder, cascade, pictures, f"{name}-{number}", **case.training)

    expected, seconds = measure(start, save("straight"))
    killed = Kills(start, save("killed"), expected, seconds, rng, SIGNALS)
    while killed.kills < kills:
        killed.kill_once()
    killed.finish()
    return killed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--kills", type=int, default=200, help="the kills of all cases (200)")
    options.add_argument("--seed", type=int, default=0, help="draws moments and signals (0)")
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "kills", help="a folder")
    given = options.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cascade = save_random_cascade(folder)
        save_pictures(folder / "pictures")
        for number, case in enumerate(CASES):
            share = given.kills * (number + 1) // len(CASES) - given.kills * number // len(CASES)
            killed = kill_case(case, number, cascade, folder, share, given.seed)
            for trouble in killed.trouble:
                print(f"{case.form}, {case}: {trouble}", flush=True)  # noqa: T201
            rows.append((case.form, str(case), killed.kills, killed.finished, len(killed.trouble)))
    table = format_table([HEADER, *([str(cell) for cell in row] for row in rows)], left=2)
    print(write_report(given.out / "kills.txt", table))  # noqa: T201


if __name__ == "__main__":
    main()
