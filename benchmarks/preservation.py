"""Time a training step with either kind of prior preservation, and without.

    python -m benchmarks.preservation [RECIPE] [--stage 1] [--steps 30] [--threads 1]

The recipe is trained with the share that it names, 0.25 if it names none, once on class pictures,
once towards the base's own predictions, and once without a prior; steps alternate, so that all
three meet the same load, and the processor's own time is measured too. For the time of a step it
does not matter what the class pictures show, so the training pictures stand in for them. Prints
each one's median and its ratio to the first.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from adapters.tables import format_table
from finetune.data.pictures import load_pictures
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Recipe
from finetune.run.stage_run import build_batches, load_trainee
from finetune.step.stages import STAGES
from finetune.train import gather


def with_prior(recipe: Recipe, prior: dict[str, Any] | None, cache_dir: str) -> Recipe:
    """Replace a recipe's prior preservation, and its cache."""
    tree = recipe.model_dump()
    return Recipe.model_validate(tree | {"prior": prior, "cache_dir": cache_dir})


def step_of(recipe: Recipe, number: int) -> Callable[[int], None]:
    """Return a function that takes the training step at an index, with its batches made before."""
    stage, accelerator = STAGES[number], Accelerator(cpu=not torch.cuda.is_available())
    training = recipe.training(stage)
    pictures = load_pictures(recipe.data, recipe.cache, *recipe.crops_px)
    material = gather(recipe, pictures, accelerator)
    trainee = load_trainee(stage, training, recipe.source(stage), 0, accelerator.device)
    low_res_px = recipe.source(STAGES[1]).picture_size_px if stage.super_resolution else None
    batches = build_batches(
        *(trainee, material, recipe.data, recipe.prior, low_res_px, 0, accelerator)
    )

    def step(index: int) -> None:
        for micro_step in range(training.accumulation):
            batch = batches(index * training.accumulation + micro_step)
            trainee.accumulate(batch.to(accelerator.device))
        trainee.update()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    recipe = load_recipe(given.recipe)
    share = recipe.prior.share if recipe.prior else 0.25
    priors: dict[str, dict[str, Any] | None] = {
        "class pictures": {"prompts": ["an animal"], "folder": recipe.data.source, "share": share},
        "the base's output": {"kind": "output", "prompts": "everyday", "share": share},
        "none": None,
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in priors}
    with tempfile.TemporaryDirectory() as cache:
        steps = {
            name: step_of(with_prior(recipe, prior, cache), given.stage)
            for name, prior in priors.items()
        }
        for index in range(given.steps + 3):  # the first compile, and record
            for name, step in steps.items():
                start = time.perf_counter(), time.process_time()
                step(index)
                end = time.perf_counter(), time.process_time()
                seconds[name].append((end[0] - start[0], end[1] - start[1]))
    medians = {
        name: [statistics.median(each) for each in zip(*times[3:], strict=True)]
        for name, times in seconds.items()
    }
    first = next(iter(medians.values()))
    rows = [
        (
            name,
            *(
                f"{1000 * own:.0f} {own / other:.2f}"
                for own, other in zip(each, first, strict=True)
            ),
        )
        for name, each in medians.items()
    ]
    header = ("prior", "ms a step, ratio", "of the processor's time")
    sys.stdout.write(format_table([header, *rows]) + "\n")


if __name__ == "__main__":
    main()
