"""Measure the GPU memory of the 6 GB recipe at full size: encoding with T5-XXL, and the whole run.

    python -m benchmarks.memory [--model FOLDER] [--out FOLDER]

Random weights of the published sizes, with the whole text encoder, are made in ``--model`` if they
are missing. Each row is a process of its own, launched as a user would, with empty caches. The
figure is PyTorch's peak of reserved memory over the whole process, from :mod:`benchmarks.observed`.
The run is the recipe with fewer steps and pictures: their numbers do not change the peak. Writes
``memory.txt`` and ``.json``.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.tables import format_table
from benchmarks.machine import ROOT, parser, prepare_models, write_report
from finetune.memory.fit import plan
from finetune.recipe.file import load_recipe
from unets.tally import GIB

RECIPE = "recipes/dreambooth_6gb.yaml"
FEWER = (
    *("stage_1.steps=30", "stage_2.steps=20", "validation.every=20", "prior.count=4"),
    *("stage_1.optimizer.warmup_steps=5", "stage_2.optimizer.warmup_steps=5"),
    *("prior.sampling.stage_1.steps=5", "prior.sampling.stage_2.steps=5"),
    *("validation.sampling.stage_1.steps=5", "validation.sampling.stage_2.steps=5"),
)
COLUMNS = {
    "reserved_gib": "GiB reserved",
    "allocated_gib": "allocated",
    "predicted_gib": "predicted",
    "resident_gib": "main memory",
    "seconds": "seconds",
}


def observe(program: Sequence[str], log: Path) -> dict[str, Any]:
    """Run one of our programs; return its peaks in GiB and its time."""
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as stream:
        seen = Path(folder) / "seen.json"
        subprocess.run(
            [sys.executable, "-m", "benchmarks.observed", str(seen), "-m", *program],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=True,
        )
        report = json.loads(seen.read_text())
    return report["peaks"] | {"seconds": report["ended_s"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = parser(__doc__, ".cache/memory/model", "runs/memory").parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    prepare_models(options.model, (1, 2), whole=True)
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        overrides = [
            *(f"base.stage_{number}={options.model / f'stage_{number}'}" for number in (1, 2)),
            *FEWER,
            f"runs_dir={scratch}/runs",
        ]
        predicted = plan(load_recipe(RECIPE, overrides))
        runs = {}
        for name, module, peak in (
            ("encoding captions", "finetune.precompute", predicted.phases[0]),
            ("the whole recipe", "finetune.train", predicted.peak),
        ):
            program = [module, RECIPE, *overrides, f"cache_dir={scratch}/{module}"]
            seen = observe(program, options.out / f"{module}.txt")
            runs[name] = seen | {"predicted_gib": peak.bytes / GIB}
    rows = [[name, *(f"{run[key] or 0:.2f}" for key in COLUMNS)] for name, run in runs.items()]
    (options.out / "memory.json").write_text(json.dumps(runs, indent=1))
    table = format_table([["", *COLUMNS.values()], *rows])
    sys.stdout.write(write_report(options.out / "memory.txt", table))


if __name__ == "__main__":
    main()
