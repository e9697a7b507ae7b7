"""Compare the memory that `finetune.plan` predicts with what a GPU takes, and measure step times.

    python -m benchmarks.plan_measured [--model FOLDER] [--out FOLDER] [--only 1-bf16-4,2-nf4-1]

Random weights of the published sizes are made in ``--model`` if they are missing. A configuration
names a stage, the base's precision and the batch size, followed by ``c`` for gradient
checkpointing, ``v`` for an adapter on the convolutions too, and ``t`` for ``torch.compile``, which
takes minutes and is measured only if ``--only`` names it. The measured figure is PyTorch's peak of
reserved memory from the first step on; the prediction is ``Footprint.reserved``, computed without
weights. Writes
``plan_measured.txt`` and ``.json``.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.tables import format_table
from benchmarks.machine import parser, prepare_models, write_report
from finetune.memory.footprint import Rehearsal
from finetune.recipe.schema import Recipe
from finetune.run.stage_run import load_trainee
from finetune.step.inputs import Batch
from finetune.step.stages import STAGES
from unets.tally import GIB

CONFIGURATIONS = (
    *("1-bf16-1", "1-bf16-4", "1-bf16-4c", "1-bf16-4v", "1-bf16-16", "1-int8-4"),
    *("1-nf4-1", "1-nf4-4", "1-nf4-4c"),
    *("2-bf16-1", "2-bf16-4", "2-bf16-4c", "2-nf4-1", "2-nf4-4", "2-nf4-4c"),
)
HEADER = ("", "predicted, GiB", "reserved", "off by", "allocated", "ms a step", "TFLOP/s")
STEPS = 20


def recipe_of(name: str, model: Path) -> Recipe:
    """Build the recipe of a configuration such as ``1-nf4-4c``."""
    stage, precision, batch = name.split("-")
    training = {
        "steps": STEPS,
        "batch_size": int(batch.rstrip("ctv")),
        "precision": precision,
        "gradient_checkpointing": "c" in batch,
        "adapter": {"targets": "attention+conv" if "v" in batch else "attention"},
    }
    return Recipe.model_validate(
        {
            "name": "plan_measured",
            "base": {f"stage_{number}": str(model / f"stage_{number}") for number in (1, 2)},
            "data": {"source": "none", "prompt": "none"},
            f"stage_{stage}": training,
        }
    )


def random_batch(blank: Batch, device: torch.device) -> Batch:
    """Make a batch with random values in the shapes of a blank one."""
    values = {
        name: torch.zeros_like(t, device=device)
        if t.dtype == torch.int64
        else torch.rand_like(t, device=device)
        for name, t in blank.tensors().items()
    }
    return Batch(**values)


def measure(name: str, model: Path) -> dict[str, Any]:
    """Predict, then measure some steps of training."""
    recipe = recipe_of(name, model)
    (stage,), device = recipe.trained, torch.device("cuda")
    sources = {each.number: recipe.source(each) for each in STAGES.values()}
    rehearsal = Rehearsal.of(stage, recipe.training(stage), sources, device)
    predicted = rehearsal.footprint()
    batch = random_batch(rehearsal.batch(recipe.training(stage).batch_size), device)
    trainee = load_trainee(stage, recipe.training(stage), recipe.source(stage), 0, device)
    if "t" in name.split("-")[2]:
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
    """Measure the card's rate in large bf16 matrix products over a second or two, in TFLOP/s."""
    one, other = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    one @ other
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        one @ other
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12


def release() -> float:
    """Return all unused memory to the card; count the GiB that are still allocated."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / GIB


def row(name: str, run: dict[str, Any]) -> list[str]:
    """Format a configuration's line of the table."""
    off = run["predicted_gib"] / run["reserved_gib"] - 1
    rate = run["tflop"] / run["step_ms"] * 1000
    gib = [f"{run[key]:.2f}" for key in ("predicted_gib", "reserved_gib", "allocated_gib")]
    return [name, *gib[:2], f"{off:+.1%}", gib[2], f"{run['step_ms']:.1f}", f"{rate:.0f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = parser(__doc__, ".cache/against_peer/model", "runs/plan_measured")
    options.add_argument("--only", default=",".join(CONFIGURATIONS), metavar="NAME[,NAME]")
    given = options.parse_args(arguments)
    rate = f"bf16 matrix products at {matrix_rate():.0f} TFLOP/s"
    results: dict[str, dict[str, Any]] = {}
    for name in given.only.split(","):
        prepare_models(given.model, [int(name[0])])
        left = release()
        results[name] = measure(name, given.model) | {"left_gib": left}
        table = format_table([HEADER, *(row(*result) for result in results.items())])
        text = write_report(given.out / "plan_measured.txt", rate, table)
        (given.out / "plan_measured.json").write_text(json.dumps(results, indent=1))
        sys.stderr.write(f"{name}: {results[name]}\n")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
