"""The training loop: one for both stages."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
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


@dataclass
class Loop:
    """The steps of a stage, with all that is logged, validated and saved between them."""

    trainee: Trainee
    batches: Batches
    tracker: Tracker
    measures: Measures | None
    """The validations; ``None`` on all processes but the main one."""
    accelerator: Accelerator
    log_every: int
    validation: Validation
    checkpoints: Path
    """The folder of the stage's checkpoints."""
    identity: Mapping[str, Any]
    """The identity of the training in a checkpoint, so that no other continues from it."""
    stop: Stop

    def run(self) -> bool:
        """Take all remaining steps; log, validate and save on the way.

        Returns:
            True if validation's patience ran out before the last step.

        Raises:
            StoppedError: on all processes after the same step, once it is saved, if ``stop`` asks
                any of them to. A validation that it interrupts is made up when the run goes on.
        """
        with self.stop.deferred():
            return self._begin() or self._take_steps()

    def _begin(self) -> bool:
        """Measure what has not been; tell whether patience has run out."""
        if self.measures and not self.measures.history:
            try_to(self.measures.begin, self.stop)
        if ending := agree(self.stop.signal, self.accelerator):
            raise StoppedError(ending)
        missed = self.measures is not None and self.measures.misses_validation
        if agree(missed and self._is_due(self.validation.every), self.accelerator):
            return self._validate_and_save(0, validating=True, saving=True)
        return False

    def _take_steps(self) -> bool:
        """Take the steps; tell whether patience has run out."""
        trainee, training = self.trainee, self.trainee.training
        device, split = self.accelerator.device, training.accumulation
        feed = prefetch(self.batches, range(trainee.step * split, training.steps * split), device)
        preserves_output = self.batches.preserves_output
        meter = Meter(self.batches.num_train_timesteps, device, preserves_output=preserves_output)
        update_size, vote = UpdateSize(trainee.unet), Vote(self.accelerator)
        size_every = math.ceil(training.steps / self.log_every / SIZE_POINTS) * self.log_every
        forget_peak_memory(device)
        stopped = False
        while not self._is_last() and not stopped:
            rate = take_step(trainee, feed, meter, self.accelerator)
            self.tracker.bar.update()
            if self._is_due(self.log_every):
                sized = self.accelerator.is_main_process and self._is_due(size_every)
                sizes = update_size if sized else None
                log_points(trainee, self.tracker, meter, self.accelerator, rate, sizes)
            started = time.perf_counter()
            stopped = self._validate_and_save(
                vote(self.stop.signal),
                validating=self._is_due(self.validation.every),
                saving=self._is_due(training.checkpoint_every),
            )
            meter.skip_time(time.perf_counter() - started)
        vote.close()
        return stopped

    def _is_last(self) -> bool:
        # more, if the recipe's steps were lowered
        return self.trainee.step >= self.trainee.training.steps

    def _is_due(self, every: int) -> bool:
        return self.trainee.step % every == 0 or self._is_last()

    def _validate_and_save(self, ending: int, *, validating: bool, saving: bool) -> bool:
        """Validate and save, unless the run stops; tell whether patience has run out."""
        measures, stopped = self.measures, False
        if validating and not ending:
            if measures:
                try_to(measures.validate, self.stop)
            ending = agree(self.stop.signal, self.accelerator)
            if not ending and self.validation.patience is not None and not self._is_last():
                stalled = measures is not None and measures.stalled
                stopped = bool(agree(stalled, self.accelerator))
        if measures and (saving or stopped or ending):
            self.tracker.flush()  # what a checkpoint is past is not shown again
            trainee = self.trainee
            state = trainee.state() | {"recipe": self.identity, "measures": measures.state()}
            state["stopped_early"] = stopped
            keep = trainee.training.keep_checkpoints
            save_checkpoint(self.checkpoints, trainee.step, state, keep)
        if ending:
            self.accelerator.wait_for_everyone()
            raise StoppedError(ending)
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
