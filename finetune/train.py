"""Train the cascade as a recipe says.

Use: accelerate launch --quiet --config_file accelerate_config.yaml -m finetune.train RECIPE
"""

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError, command_line, quiet_libraries
from finetune.command import run_command
from finetune.run.launcher import check_launcher
from finetune.run.output import lasting_output
from finetune.run.stopping import Stop, StoppedError, heed_signals, wait_for_launcher

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from finetune.data.pictures import Picture
    from finetune.evaluation.while_training import Likeness
    from finetune.recipe.schema import Recipe
    from finetune.run.folders import Folders
    from finetune.run.stage_run import Material
    from finetune.step.stages import Stage


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(
        "train",
        "Train the cascade as a recipe says.",
        arguments,
        train_or_print,
        "recipes/quickstart.yaml name=robot data.source=datasets/robot",
        dry_run={"action": "store_true", "help": "print the resolved recipe and stop"},
        force={"action": "store_true", "help": "continue under a schedule for other steps"},
        explain={
            "action": Explain,
            "nargs": "?",
            "const": "",
            "metavar": "KEY",
            "help": "explain a key of recipes, or list all, and stop",
        },
    )


class Explain(argparse.Action):
    """An option that explains a recipe's key and ends the program, without any recipe."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        """Print the explanation of the key that is given; without one, of all."""
        from finetune.recipe.key_search import explain_key

        with command_line():
            sys.stdout.write(f"{explain_key(given[1] or '')}\n")
        parser.exit()


def train_or_print(recipe: "Recipe", options: argparse.Namespace) -> str:
    """Run a recipe, or return its text if ``options.dry_run`` is set."""
    main_process = os.environ.get("RANK", "0") == "0"
    if options.dry_run:
        return preview(recipe) if main_process else ""

    def say_ended(how: str) -> None:
        if main_process:
            say_stopped(recipe, how)

    with lasting_output(), heed_signals(say_ended) as stop:
        try:
            run(recipe, stop, force=options.force)
        except StoppedError as stopped:
            if stopped.signal == signal.SIGINT:
                wait_for_launcher()  # or its own words would follow these
            say_ended(f"stopped by {stopped}")
            raise SystemExit(stopped.status) from None
    return ""


def run(recipe: "Recipe", stop: Stop, *, force: bool) -> None:
    """Run a recipe with as many processes as were launched."""
    ignored = check_launcher(os.environ)
    quiet_libraries()
    from accelerate import Accelerator, InitProcessGroupKwargs

    # the others wait while one process gathers the material, perhaps past NCCL's ten minutes
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    accelerator = Accelerator(kwargs_handlers=[waiting])
    for sentence in ignored:
        accelerator.print(f"warning: {sentence}")
    train(recipe, accelerator, stop, force=force)
    accelerator.end_training()


def say_stopped(recipe: "Recipe", how: str) -> None:
    """Say that the run was stopped, and how it goes on."""
    from tqdm import tqdm

    from finetune.run.failures import say_how_to_go_on
    from finetune.run.folders import Folders

    tqdm.write(f"{how}: {say_how_to_go_on(Folders(recipe.folder))}", file=sys.stderr)


def preview(recipe: "Recipe") -> str:
    """Return a recipe's text, of long lists of prompts only the first few."""
    text = recipe.to_yaml(shorten=True)
    if text == recipe.to_yaml():
        return text
    note = f"# Long lists are cut short here; training writes them to {recipe.folder}/recipe.yaml."
    return f"{note}\n{text}"


def train(
    recipe: "Recipe",
    accelerator: "Accelerator",
    stop: Stop | None = None,
    *,
    force: bool = False,
) -> None:
    """Run a recipe: check it, gather its material, then train each of its stages in turn.

    Args:
        recipe: the recipe.
        accelerator: the processes that train.
        stop: asks the run to stop; ``None``: nothing does.
        force: continue under a schedule for another number of steps.

    Raises:
        StoppedError: if ``stop`` asks for it.
    """
    import torch

    from finetune.data.pictures import load_pictures
    from finetune.run.early_checks import check_recipe
    from finetune.run.folders import Folders, explain_ignored, list_unfinished
    from finetune.run.run_lock import hold_run
    from finetune.run.stage_run import check_finished

    device = accelerator.device
    if device.type == "cpu":  # the launcher leaves each process a single thread
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    folders, pending = Folders(recipe.folder), list_unfinished(recipe)
    for stage in recipe.trained:
        for ignored in explain_ignored(recipe, stage) if stage not in pending else ():
            accelerator.print(f"warning: {ignored}")
    if not pending:
        with accelerator.main_process_first():
            pictures = load_pictures(recipe.data, recipe.cache, *recipe.crops_px)
        check_finished(recipe, pictures, device)
        accelerator.print(f"Already trained: the adapters are in {folders.adapters}.")
        return
    check_recipe(recipe, device)
    check_scorers(recipe)
    with hold_run(folders.run, accelerator), in_sentences(recipe, device, stop or Stop()):
        train_stages(recipe, accelerator, stop or Stop(), force=force)
    accelerator.print(point_to_results(folders))


def train_stages(recipe: "Recipe", accelerator: "Accelerator", stop: Stop, *, force: bool) -> None:
    """Gather the material of a run that no other process is at, and train what is unfinished."""
    from adapters.atomic import clear_leftovers, write_text
    from finetune.data.pictures import load_pictures
    from finetune.run.console import describe_start
    from finetune.run.fixed_losses import check_held_out
    from finetune.run.folders import Folders, list_unfinished
    from finetune.run.stage_run import check_before, train_stage

    device, folders = accelerator.device, Folders(recipe.folder)
    pending = list_unfinished(recipe)  # another run may have finished some while this one started
    if not pending:
        return
    compile_kernels(recipe, pending[0], device)
    with accelerator.main_process_first():
        pictures = load_pictures(recipe.data, recipe.cache, *recipe.crops_px)
        check_material(recipe, pictures)
    check_held_out(recipe.validation.held_out, len(pictures))
    for stage in pending:
        check_before(recipe, stage, pictures, accelerator, force=force)
    accelerator.print(describe_start(recipe, pictures, pending, accelerator.num_processes))
    likeness = load_likeness(recipe) if accelerator.is_main_process else None
    if accelerator.is_main_process:
        clear_leftovers(folders.run)
        clear_leftovers(recipe.cache)
        write_text(folders.run / "recipe.yaml", recipe.to_yaml())
    # while it lives, the threads of the steps' own operations sleep between them: more threads
    # than cores have work, as OpenMP counts
    with ThreadPoolExecutor(1) as background:
        if accelerator.is_main_process:
            background.submit(print_plan, recipe, device)
        with accelerator.main_process_first():
            material = gather(recipe, pictures, accelerator)
    for stage in pending:
        size_px = recipe.source(stage).picture_size_px
        score = likeness.against_photos(pictures, size_px) if likeness else None
        train_stage(recipe, stage, material, accelerator, score, stop, force=force)


def check_material(recipe: "Recipe", pictures: Sequence["Picture"]) -> None:
    """Check captions and class pictures before anything is encoded or written.

    Raises:
        UserError: if cleaning empties a caption, or prior.folder cannot be read.
    """
    from finetune.data.captions import check_cleaning, collect_captions
    from finetune.data.prior import load_own

    check_cleaning(collect_captions(recipe, pictures), clean_caption=recipe.text.clean_caption)
    if recipe.class_pictures:
        load_own(recipe.class_pictures, recipe.cache, recipe.crops_px)


@contextmanager
def in_sentences(recipe: "Recipe", device: "torch.device", stop: Stop) -> Iterator[None]:
    """Turn what a run can expect to fail into a sentence that names its newest checkpoint.

    Raises:
        UserError: in place of other errors.
        StoppedError: in place of errors after a request to stop, such as those of a process whose
            fellows have stopped already.
    """
    import torch

    from finetune.memory.fit import explain_out_of_memory
    from finetune.run.failures import explain, name_newest
    from finetune.run.folders import Folders

    try:
        yield
    except Exception as error:
        if stop.signal:
            raise StoppedError(stop.signal) from None
        if isinstance(error, torch.OutOfMemoryError):
            error = explain_out_of_memory(recipe, device)
        if (sentence := explain(error)) is None:
            raise
        raise UserError(f"{sentence} {name_newest(Folders(recipe.folder))}".strip()) from None


def check_scorers(recipe: "Recipe") -> None:
    """Raise a UserError if there are no such models as score the run, here or hours later."""
    if recipe.evaluation is None:
        return
    from finetune.evaluation.encoders import check_clip, check_dino

    check_clip(recipe.evaluation.clip)
    if recipe.evaluation.dino:
        check_dino(recipe.evaluation.dino)


def compile_kernels(recipe: "Recipe", stage: "Stage", device: "torch.device") -> None:
    """Begin to compile a stage's kernels, on a GPU, while the run gathers its material."""
    from unets.fused_norms import compile_ahead
    from unets.precision import compute_dtype

    precision = recipe.training(stage).precision_on(device)
    activation = recipe.source(stage).unet_config["act_fn"]
    compile_ahead(device, compute_dtype(precision, device), activation)


def load_likeness(recipe: "Recipe") -> "Likeness | None":
    """Load what scores the pictures of validation; ``None``: none are drawn, or none are scored."""
    from finetune.evaluation.while_training import Likeness

    drawn = recipe.validation.prompts or recipe.validation.other_prompts
    return Likeness(recipe.evaluation) if recipe.evaluation and drawn else None


def print_plan(recipe: "Recipe", device: "torch.device") -> None:
    """Print the memory that a run will take, or why that is not known."""
    from tqdm import tqdm

    from finetune.memory.fit import plan
    from finetune.memory.report import format_plan

    try:
        tqdm.write(format_plan(plan(recipe, device)))
    except (UserError, RuntimeError) as error:  # training does not need it
        tqdm.write(f"The memory of this run cannot be estimated: {error!r}")


def gather(
    recipe: "Recipe", pictures: Sequence["Picture"], accelerator: "Accelerator"
) -> "Material":
    """Encode the captions, and load or sample the class pictures of a prior that has them."""
    from adapters.progress import timed
    from finetune.data.captions import CaptionCache, collect_captions, embed_captions
    from finetune.data.prior import ClassPictures
    from finetune.run.stage_run import Material

    device = accelerator.device
    main, classes = accelerator.is_main_process, []
    captions = collect_captions(recipe, pictures)
    with timed(f"Captions, {len(captions):,} encoded or read", shown=main):
        embeds = embed_captions(captions, CaptionCache.of(recipe, device))
    if recipe.class_pictures:
        with timed(f"Class pictures, {recipe.class_pictures.count:,} drawn or read", shown=main):
            classes = ClassPictures.of(recipe, embeds, device).load()
    return Material(pictures, classes, embeds)


def point_to_results(folders: "Folders") -> str:
    """Say where a run's adapters are, and how to look at its curves and pictures."""
    board = "tensorboard"
    program = board if shutil.which(board) else str(Path(sys.executable).with_name(board))
    return (
        f"Adapters:    {folders.adapters}\n"
        # by default it shows ten pictures of a row, and drops some of the others: perhaps the base
        f"TensorBoard: {program} --logdir {folders.run / 'logs'} --samples_per_plugin images=100"
    )


if __name__ == "__main__":
    main()
