"""The material of a run, by content, and what of it may differ for the run to continue."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.checksums import digest_blocks
from adapters.errors import UserError, listed
from finetune.data.captions import TEXT_PARTS, CaptionCache, model_identity
from finetune.data.pictures import Picture
from finetune.recipe.schema import Recipe
from finetune.run.checkpoints import Found
from finetune.step.schedules import SCHEDULES
from finetune.step.stages import STAGES, Stage

DIVISION = ("batch_size", "accumulation")
"""The settings of a stage that, with the number of processes, divide the pictures of a step. As
long as these are as many, the training is the same."""

STEP, PROCESSES, ACCUMULATION = "the pictures of a step", "processes", "accumulation"
"""The entries of a content that tell how the pictures of a step are divided."""

PRECISIONS = ("the precision", "the precision of the text encoder")
"""The entries on precisions, which a recipe may leave to the device."""

COMPUTING = (STEP, PROCESSES, ACCUMULATION, *PRECISIONS)
"""The entries that tell how a training was computed, not what it was trained on."""

SHOWN = 60
"""The most letters of a value that a sentence about a difference quotes."""


def identify_content(
    recipe: Recipe,
    stage: Stage,
    pictures: Sequence[Picture],
    class_pictures: Sequence[Picture] | None,
    device: torch.device,
    processes: int,
) -> dict[str, Any]:
    """Describe what a stage trains on by its content, as values for a checkpoint.

    Sampled class pictures are not part of it: they follow from the base and the recipe, and another
    device may draw them again a little differently. ``None`` leaves out those of a folder too, as
    long as they are not loaded.
    """
    training, source = recipe.training(stage), recipe.source(stage)
    folder = recipe.class_pictures and recipe.class_pictures.folder
    schedulers = [dict(source.scheduler(name).config) for name in stage.schedulers]
    files = {str(n): file for n, file in enumerate(source.files.safetensors("unet"))}
    config = json.dumps([source.unet_config, schedulers], sort_keys=True, default=str)
    text, classes = CaptionCache.of(recipe, device), {}
    if class_pictures is not None:
        own = [picture.digest for picture in class_pictures if folder]
        classes = {"the pictures of prior.folder": _digest(own)}
    return classes | {
        "the pictures": _digest(picture.digest for picture in pictures),
        "the captions": _digest(picture.caption for picture in pictures),
        f"the weights of base.{stage.name}": digest_blocks(files),
        f"the configuration of base.{stage.name}": _digest([config]),
        "the text encoder": _identify_text_encoder(recipe),
        **dict(zip(PRECISIONS, (training.precision_on(device), text.precision), strict=True)),
        STEP: training.batch_size * training.accumulation * processes,
        PROCESSES: processes,
        ACCUMULATION: training.accumulation,
    }


def check_continuing(
    recipe: Recipe, stage: Stage, found: Found, content: Mapping[str, Any], *, force: bool = False
) -> list[str]:
    """Check that a stage may continue from a checkpoint, if any, and say what differs.

    Args:
        recipe: the recipe to continue with.
        stage: the stage.
        found: its newest checkpoint.
        content: what it is trained on now, as :func:`identify_content` describes it.
        force: continue under a schedule for another number of steps.

    Returns:
        Sentences on checkpoints that were passed over, and on what differs without an effect.

    Raises:
        UserError: as :func:`check_content` and :func:`check_schedule`.
    """
    notes = [found.message]
    if found.folder:
        training, step = recipe.training(stage), found.tree["step"]
        saved = found.tree["recipe"]
        notes.append(
            check_content(content, saved["content"], found.folder, recipe.folder, stage.name)
        )
        if not force:
            options = training.optimizer
            check_schedule(
                *(options.schedule, options.warmup_steps, step, training.steps, saved["steps"]),
                section=stage.name,
            )
        if step > training.steps:
            notes.append(
                f"{found.folder} is past the recipe's {training.steps} steps, so nothing is"
                f" trained: what is exported has been trained for {step}."
            )
    return [note for note in notes if note]


def check_content(
    now: Mapping[str, Any], saved: Mapping[str, Any], place: Path, run: Path, section: str
) -> str | None:
    """Check that what a checkpoint was trained on is what it is to be trained on now.

    Args:
        now: the content, as :func:`identify_content` describes it.
        saved: the checkpoint's.
        place: the checkpoint's folder, for messages.
        run: the run's folder, for messages.
        section: the stage's section of the recipe, for messages.

    Returns:
        A sentence on what differs but changes nothing, if anything does.

    Raises:
        UserError: if it would change the result, naming all that differs.
    """
    differ = [key for key in now if key != ACCUMULATION and saved.get(key) != now[key]]
    moved = [key for key in differ if key not in (STEP, PROCESSES)]
    if STEP in differ:
        wanted, each = saved[STEP], now[STEP] // now[ACCUMULATION]
        advice = f" ({wanted} before, {now[STEP]} now"
        if wanted % each == 0:
            advice += f"; {section}.accumulation={wanted // each} makes them {wanted}"
        moved.append(f"{STEP}{advice})")
    if moved:
        raise UserError(
            f"{place} was trained with other content: {listed(moved)} differ. Restore them to"
            f" continue, or else give the recipe a new name, or delete {run} to start over."
        )
    if PROCESSES in differ:
        return (
            f"{place} is continued by {now[PROCESSES]} in place of {saved[PROCESSES]} processes"
            f" with as many pictures of a step, {now[STEP]}: the training is the same, but for"
            " rounding."
        )
    return None


def check_schedule(
    schedule: str, warmup_steps: int, step: int, steps: int, before: int, *, section: str
) -> None:
    """Check that a run of ``steps`` would have come to a ``step`` at the same learning rates.

    Args:
        schedule: its name.
        warmup_steps: its warm-up.
        step: the checkpoint's.
        steps: the steps of the recipe.
        before: the steps of the recipe that the checkpoint was made with.
        section: the stage's section of the recipe, for messages.

    Raises:
        UserError: if it would not.
    """
    factor = SCHEDULES[schedule]
    if steps <= step or all(
        factor(each, steps, warmup_steps) == factor(each, before, warmup_steps)
        for each in range(step)
    ):
        return
    raise UserError(
        f"{section}.steps is {steps}, but its first {step} steps were trained at the learning rates"
        f" of {before} ({section}.optimizer.schedule is {schedule}), so a run of {steps} from the"
        f" start would differ: --force continues nonetheless; or set it to {before}, or give the"
        " recipe a new name."
    )


def find_differences(now: Any, saved: Any, name: str = "") -> list[str]:
    """List the fields in which two trees of settings differ, each with both values."""
    if isinstance(now, Mapping) and isinstance(saved, Mapping):
        keys = dict.fromkeys((*now, *saved))
        return [
            found
            for key in keys
            for found in find_differences(
                now.get(key), saved.get(key), f"{name}.{key}" if name else key
            )
        ]
    if now == saved:
        return []
    return [f"{name} is {_shorten(now)}, was {_shorten(saved)}"]


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _identify_text_encoder(recipe: Recipe) -> str | None:
    """Identify the files of a text encoder; ``None``: it is a hub's, which may not be here.

    The settings name it then, and with precomputed encodings it is never downloaded.
    """
    source = recipe.source(STAGES[1])
    return model_identity(source, TEXT_PARTS) if Path(source.name).is_dir() else None


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
