"""What the 6 GB recipe takes of a GPU at full size: encoding with T5-XXL, and the whole run.

    python -m benchmarks.memory [--model FOLDER] [--out FOLDER]

Random weights of the published sizes, the text encoder whole, made in ``--model`` where they are
not there. Each row is a process of its own, launched as a user would, with empty caches; measured
is PyTorch's peak of reserved memory over all of it, as :mod:`benchmarks.observed` sees it. The run
is the recipe with fewer steps and pictures: how many there are does not change what is held at
once. Writes ``memory.md`` and ``.json``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.against_peer import UNETS
from benchmarks.machine import ROOT, machine
from finetune.memory.fit import plan
from finetune.recipe.file import load_recipe
from unets.tally import GIB

RECIPE = "recipes/dreambooth_6gb.yaml"
FEWER = (
    *("stage_1.steps=30", "stage_2.steps=20", "validation.every=20", "prior.count=4"),
    *("prior.sampling.stage_1.steps=5", "prior.sampling.stage_2.steps=5"),
    *("validation.sampling.stage_1.steps=5", "validation.sampling.stage_2.steps=5"),
)


def observed(program: Sequence[str], log: Path) -> dict[str, Any]:
    """Run a program of ours; its peaks in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "seen.json"
        command = [sys.executable, "-m", "benchmarks.observed", str(seen), "-m", *program]
        with log.open("wb") as stream:
            subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=True,
            )
        report = json.loads(seen.read_text())
    return report["peaks"] | {"seconds": report["ended_s"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/memory/model")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/memory")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for number, name in UNETS.items():
        folder = options.model / f"stage_{number}"
        if not (folder / "model_index.json").exists():
            command = [sys.executable, "-m", "benchmarks.random_model", str(folder)]
            whole = ["--guarded", *(["--t5-xxl"] if number == 1 else [])]
            subprocess.run([*command, "--unet", name, *whole], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        overrides = [
            *(f"base.stage_{number}={options.model / f'stage_{number}'}" for number in UNETS),
            *FEWER,
            f"runs_dir={scratch}/runs",
        ]
        foreseen = plan(load_recipe(RECIPE, overrides))
        rows = {}
        for name, module, predicted in (
            ("encoding captions", "finetune.precompute", foreseen.phases[0].bytes),
            ("the whole recipe", "finetune.train", foreseen.peak.bytes),
        ):
            program = [module, RECIPE, *overrides, f"cache_dir={scratch}/{module}"]
            log = options.out / f"{module}.txt"
            rows[name] = observed(program, log) | {"predicted_gib": predicted / GIB}
    lines = [
        ", ".join(f"{key} {value}" for key, value in machine().items()),
        "",
        "| | GiB reserved | allocated | predicted | main memory | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    keys = ("reserved_gib", "allocated_gib", "predicted_gib", "resident_gib", "seconds")
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[key] or 0:.2f}' for key in keys)} |")
    (options.out / "memory.json").write_text(json.dumps(rows, indent=1))
    (options.out / "memory.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
