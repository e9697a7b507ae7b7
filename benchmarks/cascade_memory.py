"""What the whole cascade takes of a GPU when it is told how much there is, at full size.

    python -m benchmarks.cascade_memory [--model FOLDER] [--memory 6GB 14GB] [--out FOLDER]

T5-XXL, Stage I XL, Stage II L and the x4 upscaler with random weights, made in ``--model`` where
they are not there. Each memory is a process of its own, which draws two pictures through all
stages, twice, with few steps: how many steps there are does not change what is held at once. Told
are the settings that were chosen, what was foreseen, and PyTorch's peaks. Writes
``cascade_memory.md``.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters import Sampling, StageSampling, load_cascade
from benchmarks.against_peer import UNETS
from benchmarks.machine import ROOT, machine
from benchmarks.random_model import UPSCALER
from unets.tally import GIB

FEW = Sampling(
    stage_1=StageSampling(steps=10),
    stage_2=StageSampling(steps=10),
    stage_3=StageSampling(steps=10),
)
PROMPTS = ["a photo of a dog on a beach", "a photo of a cat"]


def draw(model: Path, memory: str) -> dict[str, float]:
    """Load, draw, and look."""
    start = time.perf_counter()
    cascade = load_cascade(*(model / f"stage_{number}" for number in (1, 2, 3)), memory=memory)
    loaded = time.perf_counter()
    cascade(PROMPTS, sampling=FEW)
    first = time.perf_counter()
    cascade(PROMPTS, sampling=FEW)
    return {
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "load_s": loaded - start,
        "first_s": first - loaded,
        "again_s": time.perf_counter() - first,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/memory/model")
    parser.add_argument("--memory", nargs="+", default=["6GB", "14GB"])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/cascade_memory")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        sys.stdout.write(json.dumps(draw(options.model, options.one)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for number, name in (UNETS | {3: UPSCALER}).items():
        folder = options.model / f"stage_{number}"
        if not (folder / "model_index.json").exists():
            command = [sys.executable, "-m", "benchmarks.random_model", str(folder)]
            whole = ["--guarded", *(["--t5-xxl"] if number == 1 else [])]
            subprocess.run([*command, "--unet", name, *whole], cwd=ROOT, check=True)
    lines = [
        ", ".join(f"{key} {value}" for key, value in machine().items()),
        "",
        "| memory | GiB reserved | allocated | load, s | first two pictures, s | next two, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for memory in options.memory:
        own = ["--model", str(options.model), "--one", memory]
        command = [sys.executable, "-m", "benchmarks.cascade_memory", *own]
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(run.stdout.splitlines()[-1])
        lines.append(f"| {memory} | {' | '.join(f'{value:.2f}' for value in row.values())} |")
        (options.out / "cascade_memory.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
