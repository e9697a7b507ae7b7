"""Time a shipped recipe whole, from launch to its adapters, at the published sizes.

    python -m benchmarks.job [RECIPE ...] [--processes 2] [--set key=value ...] [--out FOLDER]

Random weights of the published sizes, with the whole T5-XXL, safety checkers and watermarkers, are
made in ``--model`` if they are missing; their files are read once before, so that no run waits
for the disk. Each recipe is launched as a user would, with empty caches, on five photos of 12
megapixels. A phase ends with the line that the trainer says about it; its time counts from the line
before, and its memory is the most that PyTorch reserved in it, on the first GPU. Writes ``job.txt``
and ``.json``.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.progress import format_seconds
from adapters.tables import format_table
from benchmarks.machine import ROOT, parser, prepare_models, write_report
from benchmarks.photos import save_photos

RECIPES = ("recipes/dreambooth_cascade.yaml",)
SEEN, LAUNCHED_AT = "BENCHMARKS_JOB", "BENCHMARKS_JOB_LAUNCHED_AT"
"""The environment variables that tell a trainer's process where to write, and when it began."""

PHOTOS, PHOTO_PX = 5, (4000, 3000)
GIB = 2**30


def train_observed() -> None:
    """Train in this process, and note when each line was said and each first step was taken."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from adapters import progress

    started, said = float(os.environ[LAUNCHED_AT]), progress.say
    phases: list[dict[str, Any]] = []

    def note(what: str) -> None:
        on_gpu = torch.cuda.is_initialized()
        memory = (
            torch.cuda.max_memory_reserved()
            if on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        phases.append({"what": what, "at_s": time.monotonic() - started, "gib": memory / GIB})
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def say(line: str) -> None:
        note(line.partition(":")[0])
        said(line)

    def step(*_: object) -> None:
        if phases[-1]["what"].endswith("loading"):  # the first step since
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            note("to the first step")

    progress.say = say
    register_optimizer_step_post_hook(step)
    from finetune.train import main as train

    try:
        train(sys.argv[1:])
    finally:
        note("the end")
        if os.environ.get("RANK", "0") == "0":
            Path(os.environ[SEEN]).write_text(json.dumps(phases, indent=1))


def launch(recipe: str, overrides: Sequence[str], processes: int, out: Path) -> list[Any]:
    """Launch a recipe with empty caches; return its phases."""
    several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
    config = ["--config_file", "accelerate_config.yaml"]
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        save_photos(Path(scratch, "photos"), PHOTOS, *PHOTO_PX)
        seen, name = Path(scratch, "seen.json"), Path(recipe).stem
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--quiet", *config, *several),
            *("-m", "benchmarks.job", recipe, f"data.source={scratch}/photos"),
            *(f"runs_dir={scratch}/runs", f"cache_dir={scratch}/cache", *overrides),
        ]
        environment = os.environ | {
            SEEN: str(seen),
            LAUNCHED_AT: str(time.monotonic()),
            "HF_HUB_OFFLINE": "1",
            "TRITON_CACHE_DIR": f"{scratch}/triton",
        }
        with (out / f"{name}.txt").open("wb") as log:
            subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True
            )
        phases: list[Any] = json.loads(seen.read_text())
    return phases


def tabulate(phases: Sequence[Mapping[str, Any]]) -> str:
    """List the phases: what each took, when it ended, and its memory."""
    rows, before = [], 0.0
    for phase in phases:
        took, before = phase["at_s"] - before, phase["at_s"]
        rows.append(
            [phase["what"], format_seconds(took), format_seconds(before), f"{phase['gib']:.1f}"]
        )
    return format_table([["phase", "took", "ended after", "GiB"], *rows])


def main() -> None:
    """Run from the command line, or as one of the trainer's processes."""
    if SEEN in os.environ:
        train_observed()
        return
    command_line = parser(__doc__, ".cache/memory/model", "runs/job")
    command_line.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    command_line.add_argument("--processes", type=int, default=1)
    command_line.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="changes")
    given = command_line.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    prepare_models(given.model, (1, 2), whole=True)
    for file in given.model.rglob("*.safetensors"):
        with file.open("rb") as stream, Path(os.devnull).open("wb") as nowhere:
            shutil.copyfileobj(stream, nowhere, 2**24)
    found, parts = {}, []
    for recipe in given.recipes:
        bases = [f"base.stage_{n}={given.model / f'stage_{n}'}" for n in (1, 2)]
        changes = [*bases, "base.variant=null", *given.changes]
        found[recipe] = launch(recipe, changes, given.processes, given.out)
        parts.append(f"{recipe}, {given.processes} processes\n{tabulate(found[recipe])}")
        (given.out / "job.json").write_text(json.dumps(found, indent=1))
    sys.stdout.write(write_report(given.out / "job.txt", *parts))


if __name__ == "__main__":
    main()
