"""Memory as `finetune.plan` predicts it, beside what a GPU was measured to take; and step times.

    python -m benchmarks.plan_measured [--model FOLDER] [--out FOLDER] [--only 1-bf16-4,2-nf4-1]

Random weights of the published sizes, made in ``--model`` where they are not there. A configuration
is a stage, the base's precision, the batch size and, with a ``c``, gradient checkpointing; with a
``v``, an adapter on the convolutions too; with a ``t``, ``torch.compile``, which takes minutes and
is measured only where ``--only`` names it. Measured is PyTorch's peak of reserved memory from the
first step on; predicted is ``Footprint.reserved``, found out without weights. Writes
``plan_measured.md`` and ``.json``.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.against_peer import UNETS
from benchmarks.machine import ROOT, machine
from benchmarks.random_model import save_random_model
from finetune.memory.footprint import Rehearsal
from finetune.recipe.schema import Recipe
from finetune.run.loop import load_trainee
from finetune.step.stages import STAGES, Batch
from unets.tally import GIB

CONFIGURATIONS = (
    *(
        "1-bf16-1",
        "1-bf16-4",
        "1-bf16-4c",
        "1-bf16-4v",
        "1-bf16-16",
        "1-int8-4",
        "1-nf4-1",
        "1-nf4-4",
        "1-nf4-4c",
    ),
    *("2-bf16-1", "2-bf16-4", "2-bf16-4c", "2-nf4-1", "2-nf4-4", "2-nf4-4c"),
)
STEPS = 20


@dataclass(frozen=True)
class Configuration:
    """One way to train one stage."""

    name: str
    stage: int
    precision: str
    batch_size: int
    gradient_checkpointing: bool
    compiled: bool
    targets: str

    @classmethod
    def of(cls, name: str) -> "Configuration":
        """From a name such as ``1-nf4-4c``."""
        stage, precision, batch = name.split("-")
        targets = "attention+conv" if "v" in batch else "attention"
        size = int(batch.rstrip("ctv"))
        return cls(name, int(stage), precision, size, "c" in batch, "t" in batch, targets)

    def recipe(self, model: Path) -> Recipe:
        """A recipe that trains so."""
        training = {
            "steps": STEPS,
            "batch_size": self.batch_size,
            "precision": self.precision,
            "gradient_checkpointing": self.gradient_checkpointing,
            "adapter": {"targets": self.targets},
        }
        return Recipe.model_validate(
            {
                "name": "plan_measured",
                "base": {f"stage_{number}": str(model / f"stage_{number}") for number in UNETS},
                "data": {"source": "none", "prompt": "none"},
                f"stage_{self.stage}": training,
            }
        )


def random_batch(blank: Batch, device: torch.device) -> Batch:
    """A batch with random values, of the shapes of one without."""
    values = {
        name: torch.zeros_like(t, device=device)
        if t.dtype == torch.int64
        else torch.rand_like(t, device=device)
        for name, t in blank.tensors().items()
    }
    return Batch(**values)


def measure(configuration: Configuration, model: Path) -> dict[str, Any]:
    """Predict, then train some steps and look."""
    recipe = configuration.recipe(model)
    stage, device = STAGES[configuration.stage], torch.device("cuda")
    sources = {each.number: recipe.source(each) for each in STAGES.values()}
    rehearsal = Rehearsal.of(stage, recipe.training(stage), sources, device)
    predicted = rehearsal.footprint()
    batch = random_batch(rehearsal.batch(configuration.batch_size), device)
    trainee = load_trainee(recipe, stage, device)
    if configuration.compiled:
        trainee.compile()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        trainee.accumulate(batch)
        trainee.update()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    trainee.recorded.forget()
    return {
        "predicted_gib": predicted.reserved / GIB,
        "reserved_gib": reserved / GIB,
        "allocated_gib": allocated / GIB,
        "predicted_allocated_gib": (predicted.resident + predicted.activations) / GIB,
        "step_ms": 1000 * statistics.median(seconds[STEPS // 2 :]),
        "tflop": predicted.flops / 1e12,
        "work": predicted.work,
    }


def matrix_rate(size: int = 8192, repeats: int = 1500) -> float:
    """What the card computes for a second or two at best, in TFLOP/s: large bf16 products."""
    one, other = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    one @ other
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        one @ other
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12


def released() -> float:
    """Give the card back all that nothing refers to; GiB that are left allocated."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / GIB


def table(results: dict[str, dict[str, Any]], about: str) -> str:
    """The results as markdown."""
    lines = [
        about,
        "",
        "| stage-precision-batch (c: checkpointed, v: convolutions too, t: compiled) |"
        " predicted, GiB | reserved |"
        " off by | allocated | ms a step | TFLOP/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in results.items():
        off = run["predicted_gib"] / run["reserved_gib"] - 1
        rate = run["tflop"] / run["step_ms"] * 1000
        lines.append(
            f"| {name} | {run['predicted_gib']:.2f} | {run['reserved_gib']:.2f} | {off:+.1%} |"
            f" {run['allocated_gib']:.2f} | {run['step_ms']:.1f} | {rate:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/against_peer/model")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/plan_measured")
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), metavar="NAME[,NAME]")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    about += f", bf16 matrix products at {matrix_rate():.0f} TFLOP/s"
    results: dict[str, dict[str, Any]] = {}
    for name in options.only.split(","):
        configuration = Configuration.of(name)
        folder = options.model / f"stage_{configuration.stage}"
        if not (folder / "model_index.json").exists():
            save_random_model(folder, UNETS[configuration.stage], device="cuda")
        left = released()
        results[name] = measure(configuration, options.model) | {"left_gib": left}
        (options.out / "plan_measured.json").write_text(json.dumps(results, indent=1))
        (options.out / "plan_measured.md").write_text(table(results, about))
        sys.stderr.write(f"{name}: {results[name]}\n")
    sys.stdout.write(table(results, about))


if __name__ == "__main__":
    main()
