"""The lines before a run begins: what it found, and where it goes."""

from collections.abc import Sequence

from adapters.tables import format_facts
from finetune.data.pictures import Picture
from finetune.recipe.schema import Recipe
from finetune.run.folders import Folders
from finetune.step.stages import Stage


def describe_start(
    recipe: Recipe, pictures: Sequence[Picture], pending: Sequence[Stage], processes: int
) -> str:
    """Describe the pictures of a run, the length of its training, and its folder.

    Args:
        recipe: the run's.
        pictures: those that were found, held-out ones included.
        pending: the stages that are still to be trained.
        processes: the number of processes that train together.
    """
    captions = {picture.caption for picture in pictures}
    held_out = recipe.validation.held_out
    rows = [
        (
            "pictures",
            f"{len(pictures):,} of {recipe.data.source}, {len(captions):,} different captions"
            + f", {held_out} held out" * bool(held_out),
        )
    ]
    for stage in recipe.trained:
        text = describe_length(recipe, stage, len(pictures) - held_out, processes)
        rows.append((stage.name, text if stage in pending else "trained already"))
    rows.append(("run", str(Folders(recipe.folder).run)))
    return format_facts(rows)


def describe_length(recipe: Recipe, stage: Stage, pictures: int, processes: int) -> str:
    """Describe the length of a stage's training in steps and epochs."""
    training = recipe.training(stage)
    in_a_step = training.batch_size * training.accumulation * processes
    preserved = recipe.prior.count_in(in_a_step) if recipe.prior else 0
    epochs = training.steps * (in_a_step - preserved) / pictures
    of_these = f", {preserved} of them the prior's" * bool(preserved)
    return (
        f"{training.steps:,} steps of {in_a_step} pictures{of_these}: each picture is seen"
        f" {epochs:,.3g} times"
    )
