"""The display of a run: a progress bar, and TensorBoard."""

import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from adapters.errors import first_line
from adapters.progress import Bar, Pace, is_watched
from finetune.run.figures import (
    CLIP_I,
    CLIP_T,
    FIXED_NOISE,
    HELD_OUT,
    NEAREST,
    OTHERS_CLIP_I,
    OTHERS_CLIP_T,
    ceiling_of,
    floor_of,
)
from finetune.run.other_trackers import OtherTrackers
from finetune.step.inputs import Batch
from finetune.step.losses import Losses
from unets.memory import peak_memory_gib


def _chart(*tags: str) -> list[Any]:
    """Lay out a chart of several curves, whose tags TensorBoard takes as regular expressions."""
    return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]


LAYOUT = {
    "1. Fidelity, and what it costs": {
        "likeness to the subject (CLIP-I), the base, and real pictures": _chart(
            CLIP_I, floor_of(CLIP_I), ceiling_of(CLIP_I)
        ),
        "other prompts (CLIP-T), and the base": _chart(OTHERS_CLIP_T, floor_of(OTHERS_CLIP_T)),
        "likeness to the prompts (CLIP-T), and the base": _chart(CLIP_T, floor_of(CLIP_T)),
        "the subject in other prompts (CLIP-I), and the base": _chart(
            OTHERS_CLIP_I, floor_of(OTHERS_CLIP_I)
        ),
        "the nearest training picture, and among real pictures": _chart(
            NEAREST, ceiling_of(NEAREST)
        ),
    },
    "2. Loss": {
        "at fixed noise, on training and held-out pictures": _chart(FIXED_NOISE, HELD_OUT),
        "in training": _chart("loss", "loss/mse"),
        "by noise": _chart(*(f"loss_by_noise/quarter_{quarter}" for quarter in range(1, 5))),
    },
    "3. Speed": {
        "pictures per second": _chart("speed/pictures_per_second"),
        "memory in GiB": _chart("speed/peak_memory_gib"),
    },
}
"""The charts of TensorBoard's tab of custom scalars, by category."""


ABOUT = ".about"
"""The end of the name of the file of events that describes the run, written at each start."""


class Meter:
    """Sums of the steps' figures, kept on the device so that no step waits to read them.

    Args:
        num_train_timesteps: the length of the schedule.
        device: the device of the losses.
        preserves_output: the run preserves the base's output, and the loss of that is a curve of
            its own; the other parts of the loss, and the losses by noise, are of the rest.
    """

    QUARTERS = 4

    def __init__(
        self, num_train_timesteps: int, device: torch.device, *, preserves_output: bool = False
    ) -> None:
        self.num_train_timesteps, self.preserves_output = num_train_timesteps, preserves_output
        self.sums = torch.zeros(7 + 2 * self.QUARTERS, dtype=torch.float64, device=device)
        """Sums of four losses, of norms, batches and steps; of each quarter's losses and rows."""
        self.pictures = 0
        self.since = time.perf_counter()

    def add(self, losses: Losses, batch: Batch) -> None:
        """Count one batch: its weighted losses, and each picture's loss by timestep quarter.

        A batch whose losses are not finite counts for nothing.
        """
        quarter = batch.timesteps * self.QUARTERS // self.num_train_timesteps
        hot = torch.nn.functional.one_hot(quarter, self.QUARTERS).double()
        preservation = losses.preservation
        if preservation is None:
            preservation = torch.zeros_like(losses.mse)
        if batch.preserved is not None:  # their distance from the base says nothing of the noise
            hot.index_fill_(0, batch.preserved, 0)
        parts = [losses.total.detach(), losses.mse, losses.bound, preservation]
        values = torch.stack(parts).double()
        finite = values.isfinite().all()
        values = torch.where(finite, values, torch.zeros_like(values))
        self.sums[:4] += values @ batch.weight.double()
        self.sums[5] += finite
        quarters = self.sums[7:].view(2, -1)
        quarters[0] += values[0] @ hot
        quarters[1] += hot.sum(0) * finite
        self.pictures += len(batch.timesteps)

    def add_step(self, gradient_norm: Tensor) -> None:
        """Count one optimizer step, unless its gradient is not finite."""
        finite = gradient_norm.isfinite()
        self.sums[4] += torch.where(finite, gradient_norm, torch.zeros_like(gradient_norm))
        self.sums[6] += finite

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes since the last reading; waits for the device once.

        Losses are weighted as in training, so ``loss`` is the sum of the parts under ``loss/``.
        What was not finite all the time has no mean.
        """
        sums = accelerator.reduce(self.sums, "mean")
        assert isinstance(sums, Tensor)
        total, mse, bound, preservation, norm, batches, steps, *quarters = sums.tolist()
        seconds = time.perf_counter() - self.since
        points = {
            "speed/pictures_per_second": self.pictures * accelerator.num_processes / seconds,
            "speed/peak_memory_gib": peak_memory_gib(self.sums.device),
        }
        if batches:
            points |= {
                "loss": total / batches,
                "loss/mse": mse / batches,
                "loss/bound_bits": bound / batches,
            }
            if self.preserves_output:
                points["loss/preservation"] = preservation / batches
        if steps:
            points["optimizer/gradient_norm"] = norm / steps
        for quarter in range(self.QUARTERS):
            if count := quarters[self.QUARTERS + quarter]:
                points[f"loss_by_noise/quarter_{quarter + 1}"] = quarters[quarter] / count
        self.sums.zero_()
        self.pictures = 0
        self.since = time.perf_counter()
        return points

    def skip_time(self, seconds: float) -> None:
        """Leave time not spent training out of the rates."""
        self.since += seconds


def flatten(settings: Mapping[str, Any], path: str = "") -> dict[str, float | str]:
    """Flatten nested settings into numbers and texts by dotted name; ``None`` is left out."""
    flat: dict[str, float | str] = {}
    for name, value in settings.items():
        place = f"{path}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{place}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[place] = value
        elif value is not None:
            flat[place] = str(value)
    return flat


def order_event_files(folder: Path) -> None:
    """Rename the event files of earlier starts so that TensorBoard reads them before a new one.

    It reads them by name, which begins with the second of their start: one of the same second, or
    of a clock that has been set back since, would be read last and hide what is new.
    """
    earlier = sorted(folder.glob("events.out.tfevents.*"))
    if earlier and earlier[-1].name >= f"events.out.tfevents.{int(time.time()):010d}":
        for number, file in enumerate(earlier):
            file.rename(file.with_name(f"events.out.tfevents.{0:010d}.{number:06d}"))


def begin_events(folder: Path, first: int) -> SummaryWriter:
    """Begin a file of events that goes on from a step, without what earlier starts left after it.

    Args:
        folder: the stage's folder of events.
        first: the step of the checkpoint that the run continues from; 0: it begins.
    """
    for file in folder.glob("events.out.tfevents.*"):
        if first == 0 or file.name.endswith(ABOUT):
            file.unlink()
    order_event_files(folder)
    # hides the points after the checkpoint, as the run makes them again
    return SummaryWriter(str(folder), purge_step=first + 1 if first else None)


class Tracker:
    """TensorBoard and the progress bar of one stage, or a log's lines, on the main process only.

    None of them is what a run is for: if TensorBoard's events cannot be written, that is said once,
    and training goes on without them.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, title: str, first: int, steps: int):
        main = accelerator.is_main_process
        self.folder = folder
        self.others = OtherTrackers()
        self.writer: SummaryWriter | None = None
        self._held: list[Callable[[SummaryWriter], object]] | None = None
        self.title = f"Training {title}"
        self.pace = Pace(first, steps)
        self.logs_lines = main and not is_watched()
        self.bar = Bar(
            desc=self.title,
            total=steps,
            initial=first,
            unit="step",
            disable=not main or self.logs_lines,
            dynamic_ncols=True,
        )
        if main:
            threading.excepthook = _HushedWriters()
            with self._surviving():
                self.writer = begin_events(folder, first)

    def about(self, texts: Mapping[str, str]) -> None:
        """Describe the run in text panels that keep line breaks, in place of an earlier start's."""
        if self.writer is None:
            return
        with self._surviving(), SummaryWriter(str(self.folder), filename_suffix=ABOUT) as writer:
            writer.add_custom_scalars(LAYOUT)
            for tag, text in texts.items():
                writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()))

    def markdown(self, tag: str, text: str, step: int) -> None:
        """Add a text panel in Markdown."""
        self._write(lambda writer: writer.add_text(tag, text, step))

    def warn(self, kind: str, sentence: str, step: int) -> None:
        """Print a warning above the bar, and add it as a text panel."""
        self.bar.write(f"warning: {sentence}")
        self.markdown(f"warnings/{kind.replace(' ', '_')}", sentence, step)

    def points(self, points: Mapping[str, float], step: int) -> None:
        """Add a point to each curve of training, and a line to a log, which has no bar."""
        if "loss" in points:
            loss = f"{points['loss']:.4f}"
            self.bar.set_postfix({"loss": loss}, refresh=False)
            if self.logs_lines:
                line = f"{self.title}: {self.pace.describe(step)}, loss {loss}"
                self.bar.write(line, file=sys.stderr)
        self.curves(points, step)

    def curves(self, points: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        self.others.log(points, step)
        for tag, value in points.items():
            self._write(partial(_add_point, tag, value, step))

    def hparams(self, settings: Mapping[str, Any], figures: Collection[str]) -> None:
        """Add a row to the table that compares runs.

        Args:
            settings: the columns of settings; lists and sections are flattened into text.
            figures: the tags of the curves whose last points are its other columns.
        """

        def add(writer: SummaryWriter) -> None:
            # add_hparams of the writer would make a run of its own for them
            for summary in hparams(flatten(settings), dict.fromkeys(figures, 0.0)):
                writer._get_file_writer().add_summary(summary)

        self._write(add)

    def skip_time(self, seconds: float) -> None:
        """Leave time not spent training out of the bar's rate."""
        self.pace.skip(seconds)
        if not self.bar.disable:
            self.bar.start_t += seconds
            self.bar.last_print_t += seconds

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        """Add a picture panel."""
        self.others.picture(tag, picture, step)
        pixels = np.asarray(picture)
        self._write(lambda writer: writer.add_image(tag, pixels, step, dataformats="HWC"))
        self.flush()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Add what the block adds all at once, at its end, or nothing if it is interrupted."""
        held: list[Callable[[SummaryWriter], object]] = []
        self._held = held
        try:
            yield
        finally:
            self._held = None
        for write in held:
            self._write(write)
        self.flush()

    def flush(self) -> None:
        """Write what has been added so far to the disk."""
        if self.writer and self._held is None:
            with self._surviving():
                self.writer.flush()

    def close(self) -> None:
        """Close both, writing pending events."""
        self.bar.close()
        self.others.close()
        if self.writer:
            with self._surviving():
                self.writer.close()

    def _write(self, write: Callable[[SummaryWriter], object]) -> None:
        """Write to TensorBoard, now or at the end of :meth:`together`."""
        if self._held is not None:
            self._held.append(write)
        elif self.writer:
            with self._surviving():
                write(self.writer)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Give TensorBoard up, with a warning, if the block cannot write its events."""
        try:
            yield
        except Exception as error:  # TensorFlow, where it is installed, has its own
            self.writer = None
            reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
            self.bar.write(
                f"warning: TensorBoard's events can no longer be written to {self.folder}"
                f" ({reason}); training goes on without them."
            )


def _add_point(tag: str, value: float, step: int, writer: SummaryWriter) -> None:
    writer.add_scalar(tag, value, step)


class _HushedWriters:
    """A hook for errors of threads that leaves out those of TensorBoard's writers.

    A writer's thread raises its error both there and, later, in the thread that uses it.
    """

    def __init__(self) -> None:
        self._others = threading.excepthook

    def __call__(self, error: "threading.ExceptHookArgs") -> None:
        if type(error.thread).__name__ != "_AsyncWriterThread":
            self._others(error)
