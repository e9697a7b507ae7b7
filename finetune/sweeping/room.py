"""Room for runs at once: whether the free memory of the GPU holds them all."""

import subprocess
import sys
from collections.abc import Collection
from typing import Any

import torch

from adapters.errors import UserError
from finetune.memory.fit import Phase, plan
from finetune.recipe.schema import Recipe
from unets.tally import DRIVER_BYTES, GIB

WITHOUT_WEIGHT: dict[str, Any] = {
    "name": True,
    "runs_dir": True,
    "seed": True,
    "data": True,
    "evaluation": {"identifier", "subject"},
    "stage_1": {"steps": True, "optimizer": {"learning_rate"}},
    "stage_2": {"steps": True, "optimizer": {"learning_rate"}},
}
"""Fields of a recipe that leave its memory as it is, so that runs that differ in no other share a
plan."""


def check_room(recipes: Collection[Recipe], at_once: int, device: torch.device) -> str:
    """Check that the GPU's free memory holds several runs at once.

    Args:
        recipes: the runs, at least one, any of which may run at the same time.
        at_once: the number of runs at a time.
        device: the GPU.

    Returns:
        How many fit, in a sentence.

    Raises:
        UserError: if fewer fit than are asked for.
    """
    free = measure_free_bytes(device)
    largest = find_largest(recipes, device)
    fit = int(free // (largest.bytes + DRIVER_BYTES))
    needs = (
        f"each run takes up to {(largest.bytes + DRIVER_BYTES) / GIB:.1f} GiB of the GPU's memory"
        f" ({largest.name}), of which {free / GIB:.1f} GiB are free"
    )
    if fit < at_once:
        advice = f"lower it to {fit}" if fit else "lower it, and see python -m finetune.plan"
        raise UserError(f"at_once is {at_once}, but {fit} would fit: {needs}; {advice}.")
    return f"At once, {fit} runs would fit: {needs}."


def find_largest(recipes: Collection[Recipe], device: torch.device) -> Phase:
    """Find the phase of all runs that takes the most memory; scoring counts as a validation."""
    different = {each.model_dump_json(exclude=WITHOUT_WEIGHT): each for each in recipes}
    peaks = (plan(as_scored(recipe), device).peak for recipe in different.values())
    return max(peaks, key=lambda phase: phase.bytes)


def as_scored(recipe: Recipe) -> Recipe:
    """Return a recipe that validates with the pictures by which the sweep scores it."""
    settings, own = recipe.evaluation, recipe.validation
    assert settings is not None
    samplings = [own.sampling, settings.sampling or own.sampling]
    fields = {
        "prompts": max(own.prompts, settings.prompts + settings.other_prompts, key=len),
        "stage_2_prompts": None,
        "sampling": max(samplings, key=lambda sampling: sampling.batch_size),
    }
    return recipe.model_copy(update={"validation": own.model_copy(update=fields)})


def measure_free_bytes(device: torch.device) -> float:
    """Measure a GPU's free memory in a process of its own, which leaves nothing on it behind."""
    question = f"import torch; print(torch.cuda.mem_get_info({device.index or 0})[0])"
    answer = subprocess.run([sys.executable, "-c", question], check=True, capture_output=True)
    return int(answer.stdout) + DRIVER_BYTES  # that process's own share, given back since
