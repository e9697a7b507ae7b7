"""Estimate the GPU memory of a run, and find the fastest settings that fit a card.

python -m finetune.plan RECIPE [key=value …] [--vram 8GB]
"""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapters.errors import UserError, say_loading
from finetune.command import run_command

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(
        "plan",
        "Estimate the memory that a recipe needs; this machine need not have a GPU.",
        arguments,
        describe_memory,
        "recipes/dreambooth_cascade.yaml --vram 8GB",
        vram={"help": "find the fastest settings that fit a card, such as 8GB"},
        rate={
            "type": float,
            "metavar": "TFLOPS",
            "help": "the GPU's rate of large bf16 matrix products in TFLOP/s, to tell the time too"
            " (default: this GPU's, measured once)",
        },
        device={
            "choices": ("gpu", "cpu"),
            "default": "gpu",
            "help": "gpu: a GPU, here or not; cpu: main memory, as the trainer prints it without a"
            " GPU (default: gpu)",
        },
    )


def describe_memory(recipe: "Recipe", options: argparse.Namespace) -> str:
    """Describe a recipe's memory, or the settings that fit ``options.vram``, and its downloads."""
    say_loading()
    import torch

    from adapters.cascade.memory_budget import GPU
    from finetune.memory.fit import plan
    from finetune.memory.published import use_published_sizes
    from finetune.memory.report import format_downloads, format_fit, format_plan, say_sizes_used
    from finetune.memory.timing import find_rate

    recipe, unread = use_published_sizes(recipe)
    about, on_cpu, vram = "", options.device == "cpu", options.vram
    if on_cpu and vram is not None:
        raise UserError("--vram is the memory of a GPU: leave out --device cpu, or --vram.")
    if not on_cpu and not torch.cuda.is_available():
        about = (
            "Estimated for a GPU, where precision auto means bf16; this machine has none, and would"
            " train in main memory (--device cpu)."
        )
    device = torch.device("cpu") if on_cpu else GPU
    rate = find_rate(recipe.cache) if options.rate is None else 1e12 * options.rate
    if rate is not None and not 0 < rate < math.inf:
        raise UserError(f"--rate must be a number above 0, in TFLOP/s (got {options.rate:g}).")
    if on_cpu:  # the measure of time is a GPU's
        rate = None
    if vram is None:
        text = format_plan(plan(recipe, device), rate)
    else:
        text = format_fit(recipe, vram, rate)
    parts = (about, say_sizes_used(unread), text, format_downloads(recipe))
    return "\n\n".join(filter(None, parts)) + "\n"


if __name__ == "__main__":
    main()
