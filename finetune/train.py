"""Teach the cascade what a recipe says.

accelerate launch --config_file accelerate_config.yaml -m finetune.train RECIPE [key=value …]
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm import tqdm

from adapters.atomic import write_text
from adapters.errors import UserError, command_line
from finetune.data.captions import captions_of, embed_captions
from finetune.data.pictures import Picture, load_pictures
from finetune.data.prior import class_pictures
from finetune.memory.fit import explain_out_of_memory, plan
from finetune.memory.report import format_plan
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Recipe
from finetune.run.folders import Folders, check_recipe, finished
from finetune.run.loop import Material, train_stage
from finetune.step.stages import Stage
from unets.fused_norms import compile_ahead
from unets.loading import compute_dtype


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="finetune.train", description="Teach the cascade what a recipe says."
    )
    parser.add_argument("recipe", help="a YAML file, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. stage_1.steps=100")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    options = parser.parse_intermixed_args(arguments)
    with command_line():
        recipe = load_recipe(options.recipe, options.overrides)
        if options.dry_run:
            if os.environ.get("RANK", "0") == "0":
                sys.stdout.write(recipe.to_yaml())
            return
        # one process gathers the material for all, which may take longer than NCCL's ten minutes
        waiting = InitProcessGroupKwargs(timeout=timedelta(hours=12))
        accelerator = Accelerator(kwargs_handlers=[waiting])
        train(recipe, accelerator)
        accelerator.end_training()


def train(recipe: Recipe, accelerator: Accelerator) -> None:
    """Run a recipe: gather its material, then teach each of its stages in turn."""
    if accelerator.device.type == "cpu":  # the launcher leaves each process a single thread
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    folders = Folders(recipe.folder)
    pending = [stage for stage in recipe.trained if not finished(recipe, stage)]
    if not pending:
        accelerator.print(f"Already trained: the adapters are in {folders.adapters}.")
        return
    check_recipe(recipe)
    first = pending[0]
    precision = recipe.training(first).precision_on(accelerator.device)
    compile_ahead(
        accelerator.device,
        compute_dtype(precision, accelerator.device),
        recipe.source(first).unet_config["act_fn"],
    )
    with accelerator.main_process_first():
        pictures = load_pictures(
            recipe.data, recipe.cache, recipe.crop_px, smaller_px=recipe.smaller_crops_px
        )
    if accelerator.is_main_process:
        write_text(folders.run / "recipe.yaml", recipe.to_yaml())
    try:
        run(recipe, pending, pictures, accelerator)
    except torch.OutOfMemoryError:
        raise explain_out_of_memory(recipe, accelerator.device) from None
    if accelerator.is_main_process:
        accelerator.print(
            f"Adapters:    {folders.adapters}\n"
            f"TensorBoard: {program('tensorboard')} --logdir {folders.run / 'logs'}"
        )


def program(name: str) -> str:
    """How a shell finds a program of this environment."""
    return name if shutil.which(name) else str(Path(sys.executable).with_name(name))


def run(
    recipe: Recipe,
    pending: Sequence[Stage],
    pictures: Sequence[Picture],
    accelerator: Accelerator,
) -> None:
    """Say what the run will take, gather the rest of its material, and teach the stages."""
    with ThreadPoolExecutor(1) as beside:
        if accelerator.is_main_process:
            beside.submit(say_plan, recipe, accelerator.device)
        with accelerator.main_process_first():
            material = gather(recipe, pictures, accelerator)
        for stage in pending:
            train_stage(recipe, stage, material, accelerator)


def say_plan(recipe: Recipe, device: torch.device) -> None:
    """Print what the run will take; that it cannot be told is no reason to stop."""
    try:
        tqdm.write(format_plan(plan(recipe, device)))
    except (UserError, RuntimeError) as error:
        tqdm.write(f"What this run will take could not be foreseen: {error!r}")


def gather(recipe: Recipe, pictures: Sequence[Picture], accelerator: Accelerator) -> Material:
    """Encode the captions and, for prior preservation, get class pictures."""
    embeds = embed_captions(captions_of(recipe, pictures), recipe, accelerator.device)
    classes = class_pictures(recipe, embeds, accelerator.device) if recipe.prior else []
    return Material(pictures, classes, embeds)


if __name__ == "__main__":
    main()
