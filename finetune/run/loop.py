"""The training loop: one for both stages."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from adapters.errors import UserError
from finetune.data.batches import Batches, prefetch
from finetune.recipe.schema import Validation
from finetune.run.agreement import Vote, agree
from finetune.run.checkpoints import save_checkpoint
from finetune.run.measures import Measures
from finetune.run.stopping import Stop, StoppedError
from finetune.run.tracking import Meter, Tracker
from finetune.run.trainee import Trainee
from finetune.run.update_size import UpdateSize
from finetune.step.inputs import Batch
from finetune.step.optimizers import set_learning_rate
from finetune.step.schedules import SCHEDULES
from unets.memory import forget_peak_memory

SIZE_POINTS = 25
"""The most points of a run that measure the size of the update, which changes slowly."""

MOST_SKIPPED = 10
"""The steps skipped one after the other that end a run, or half of its steps: it will not
recover."""


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
    stop: Stop,
) -> bool:
    """Take all remaining steps; log, validate and save on the way.

    Checkpoints hold the ``identity`` of the recipe, so that no other recipe continues from them.

    Returns:
        True if validation's patience ran out before the last step.

    Raises:
        StoppedError: on all processes after the same step, once it is saved, if ``stop`` asks any
            of them to. A validation that it interrupts is made up when the run goes on.
    """
    training, device = trainee.training, accelerator.device

    def is_last() -> bool:
        return trainee.step >= training.steps  # more, if the recipe's steps were lowered

    def is_due(every: int) -> bool:
        return trainee.step % every == 0 or is_last()

    def validate_and_save(ending: int, *, validating: bool, saving: bool) -> bool:
        """Validate and save, unless the run stops; tell whether patience has run out."""
        stopped = False
        if validating and not ending:
            if measures:
                try_to(measures.validate, stop)
            ending = agree(stop.signal, accelerator)
            if not ending and validation.patience is not None and not is_last():
                stopped = bool(agree(measures is not None and measures.stalled, accelerator))
        if measures and (saving or stopped or ending):
            tracker.flush()  # what a checkpoint is past is not shown again
            state = trainee.state() | {"recipe": identity, "measures": measures.state()}
            state["stopped_early"] = stopped
            save_checkpoint(checkpoints, trainee.step, state, training.keep_checkpoints)
        if ending:
            accelerator.wait_for_everyone()
            raise StoppedError(ending)
        return stopped

    with stop.deferred():
        stopped = False
        if measures and not measures.history:
            try_to(measures.begin, stop)
        if ending := agree(stop.signal, accelerator):
            raise StoppedError(ending)
        missed = measures is not None and is_due(validation.every) and measures.misses_validation
        if agree(missed, accelerator):
            stopped = validate_and_save(0, validating=True, saving=True)
        feed = prefetch(
            batches,
            range(trainee.step * training.accumulation, training.steps * training.accumulation),
            device,
        )
        preserves_output = batches.preserves_output
        meter = Meter(batches.num_train_timesteps, device, preserves_output=preserves_output)
        update_size, vote = UpdateSize(trainee.unet), Vote(accelerator)
        size_every = math.ceil(training.steps / log_every / SIZE_POINTS) * log_every
        forget_peak_memory(device)
        while not is_last() and not stopped:
            rate = take_step(trainee, feed, meter, accelerator)
            tracker.bar.update()
            if is_due(log_every):
                sized = accelerator.is_main_process and is_due(size_every)
                sizes = update_size if sized else None
                log_points(trainee, tracker, meter, accelerator, rate, sizes)
            started = time.perf_counter()
            stopped = validate_and_save(
                vote(stop.signal),
                validating=is_due(validation.every),
                saving=is_due(training.checkpoint_every),
            )
            meter.skip_time(time.perf_counter() - started)
        vote.close()
    return stopped


def try_to(work: Callable[[], object], stop: Stop) -> None:
    """Do a piece of work, unless a request to stop interrupts it."""
    with suppress(StoppedError), stop.interrupting():
        work()


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
    points = meter.read(accelerator)
    if not check_skipped(trainee, tracker):  # which explains the lack of a gradient
        trainee.watch.check()
    if update_size is not None:
        points |= {f"update/{block}": size for block, size in update_size().items()}
    points["optimizer/learning_rate"] = learning_rate
    tracker.points(points, trainee.step)


def check_skipped(trainee: Trainee, tracker: Tracker) -> int:
    """Say how many steps have been skipped since the last point, and plot how many in all.

    Returns:
        The steps skipped one after the other up to now.

    Raises:
        UserError: if so many have been skipped one after the other that training has diverged.
    """
    in_all, in_a_row = trainee.skipped.tolist()
    if new := in_all - trainee.skipped_and_said:
        trainee.skipped_and_said = in_all
        tracker.curves({"optimizer/skipped_steps": in_all}, trainee.step)
        tracker.warn(
            "skipped steps",
            f"Step {trainee.step}: {new} of the last steps changed nothing, as their gradients or"
            f" the weights after them were not finite ({in_all} so far).",
            trainee.step,
        )
    if in_a_row >= min(MOST_SKIPPED, max(trainee.training.steps // 2, 1)):
        raise UserError(
            f"Training has diverged: none of the last {in_a_row} steps up to step {trainee.step} of"
            f" {trainee.stage.name} had a finite gradient. Lower optimizer.learning_rate, or set"
            " optimizer.max_grad_norm, and give the recipe a new name."
        )
    return int(in_a_row)
