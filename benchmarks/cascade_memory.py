"""Measure the GPU memory and time of the whole cascade at given ``memory`` limits, at full size.

    python -m benchmarks.cascade_memory [--model FOLDER] [--memory 6GB 14GB] [--out FOLDER]

T5-XXL, Stage I XL, Stage II L and the x4 upscaler with random weights are made in ``--model`` if
they are missing. Each limit is measured in a process of its own, which draws two pictures through
all stages, twice, with few steps: their number does not change the peak. Prints the chosen
settings, the predicted memory, and PyTorch's peaks. Writes ``cascade_memory.txt``.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters import Sampling, StageSampling, load_cascade
from adapters.tables import format_table
from benchmarks.machine import ROOT, SIZES, parser, prepare_models, write_report
from unets.tally import GIB

FEW = Sampling(
    stage_1=StageSampling(steps=10),
    stage_2=StageSampling(steps=10),
    stage_3=StageSampling(steps=10),
)
PROMPTS = ["a photo of a dog on a beach", "a photo of a cat"]
HEADER = ("memory", "GiB reserved", "allocated", "load, s", "first two pictures, s", "next two, s")


def draw(model: Path, memory: str) -> list[float]:
    """Load and draw; return the figures of :data:`HEADER`."""
    start = time.perf_counter()
    cascade = load_cascade(*(model / f"stage_{number}" for number in SIZES), memory=memory)
    loaded = time.perf_counter()
    cascade(PROMPTS, sampling=FEW)
    first = time.perf_counter()
    cascade(PROMPTS, sampling=FEW)
    again = time.perf_counter()
    peaks = (torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated())
    return [*(peak / GIB for peak in peaks), loaded - start, first - loaded, again - first]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = parser(__doc__, ".cache/memory/model", "runs/cascade_memory")
    options.add_argument("--memory", nargs="+", default=["6GB", "14GB"])
    options.add_argument("--one", help="measure this limit in this very process")
    given = options.parse_args(arguments)
    if given.one:
        sys.stdout.write(json.dumps(draw(given.model, given.one)))
        return
    prepare_models(given.model, SIZES, whole=True)
    rows: list[list[str]] = []
    for memory in given.memory:
        command = [sys.executable, "-m", "benchmarks.cascade_memory"]
        command += ["--model", str(given.model), "--one", memory]
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(run.stdout.splitlines()[-1])
        rows.append([memory, *(f"{figure:.2f}" for figure in figures)])
        text = write_report(given.out / "cascade_memory.txt", format_table([HEADER, *rows]))
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
