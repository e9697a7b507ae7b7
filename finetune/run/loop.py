"""The training loop: one for both stages."""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from adapters.errors import UserError
from finetune.data.batches import Batches, prefetch
from finetune.recipe.schema import Validation
from finetune.run.checkpoints import save_checkpoint
from finetune.run.measures import Measures, agree
from finetune.run.tracking import Meter, Tracker
from finetune.run.trainee import Trainee
from finetune.run.update_size import UpdateSize
from finetune.step.inputs import Batch
from finetune.step.optimizers import set_learning_rate
from finetune.step.schedules import SCHEDULES
from unets.memory import forget_peak_memory

SIZE_POINTS = 25
"""The most points of a run that measure the size of the update, which changes slowly."""


def run_steps(
    trainee: Trainee,
    batches: Batches,
    tracker: Tracker,
    measures: Measures | None,
    accelerator: Accelerator,
    *,
    log_every: int,
    validation: Validation,
    checkpoints: Path,
    identity: Mapping[str, Any],
) -> bool:
    """Take all remaining steps; log, validate and save on the way.

    Checkpoints hold the ``identity`` of the recipe, so that no other recipe continues from them.

    Returns:
        True if validation's patience ran out before the last step.
    """
    training, device = trainee.training, accelerator.device
    if measures and not measures.history:
        measures.begin()
    meter = Meter(batches.num_train_timesteps, device, preserves_output=batches.preserves_output)
    update_size = UpdateSize(trainee.unet)
    size_every = math.ceil(training.steps / log_every / SIZE_POINTS) * log_every
    forget_peak_memory(device)
    indices = range(trainee.step * training.accumulation, training.steps * training.accumulation)
    feed = prefetch(batches, indices, device)
    stopped = False
    while trainee.step < training.steps and not stopped:
        rate = take_step(trainee, feed, meter, accelerator)
        tracker.bar.update()
        done, last = trainee.step, trainee.step == training.steps
        if done % log_every == 0 or last:
            sized = accelerator.is_main_process and (done % size_every == 0 or last)
            log_points(trainee, tracker, meter, accelerator, rate, update_size if sized else None)
        started = time.perf_counter()
        if done % validation.every == 0 or last:
            if measures:
                measures.validate()
            if validation.patience is not None and not last:
                stopped = agree(measures is not None and measures.stalled, accelerator)
        if measures and (done % training.checkpoint_every == 0 or last or stopped):
            state = trainee.state() | {"recipe": identity, "measures": measures.state()}
            state["stopped_early"] = stopped
            save_checkpoint(checkpoints, done, state, training.keep_checkpoints)
        meter.skip_time(time.perf_counter() - started)
    return stopped


def take_step(
    trainee: Trainee, feed: Iterator[Batch], meter: Meter, accelerator: Accelerator
) -> float:
    """Take an optimizer step on this process's batches of a global batch.

    Returns:
        The learning rate of the step.
    """
    training, options = trainee.training, trainee.training.optimizer
    factor = SCHEDULES[options.schedule](trainee.step, training.steps, options.warmup_steps)
    set_learning_rate(trainee.optimizer, factor)
    for _ in range(training.accumulation):
        batch = next(feed)
        meter.add(trainee.accumulate(batch), batch)
    if accelerator.num_processes > 1:
        gradient = trainee.weights.gradient
        gradient.copy_(accelerator.reduce(gradient, "mean"))
    meter.add_step(trainee.update())
    return options.learning_rate * factor


def log_points(
    trainee: Trainee,
    tracker: Tracker,
    meter: Meter,
    accelerator: Accelerator,
    learning_rate: float,
    update_size: UpdateSize | None,
) -> None:
    """Plot the means since the last point, and the size of the update if it is to be measured.

    Raises:
        UserError: if training has diverged, or a tensor has received no gradient.
    """
    points = meter.read(accelerator, trainee.training.accumulation)
    check_loss(points["loss"], trainee.step)
    trainee.watch.check()
    if update_size is not None:
        points |= {f"update/{block}": size for block, size in update_size().items()}
    points["optimizer/learning_rate"] = learning_rate
    tracker.points(points, trainee.step)


def check_loss(loss: float, step: int) -> None:
    """Raise a UserError if training has diverged."""
    if not math.isfinite(loss):
        raise UserError(
            f"The loss is {loss} at step {step}: training has diverged; lower"
            " optimizer.learning_rate, or set optimizer.max_grad_norm, and delete the checkpoints"
            " of this run that are newer than the last finite loss."
        )
