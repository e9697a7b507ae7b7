"""The display of a run: a progress bar, and TensorBoard."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from finetune.step.inputs import Batch
from finetune.step.losses import Losses
from unets.memory import peak_memory_gib


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
        self.sums = torch.zeros(5 + 2 * self.QUARTERS, dtype=torch.float64, device=device)
        self.steps = self.pictures = 0
        self.since = time.perf_counter()

    def add(self, losses: Losses, batch: Batch) -> None:
        """Count one batch: its weighted losses, and each picture's loss by timestep quarter."""
        quarter = batch.timesteps * self.QUARTERS // self.num_train_timesteps
        hot = torch.nn.functional.one_hot(quarter, self.QUARTERS).double()
        preservation = losses.preservation
        if preservation is None:
            preservation = torch.zeros_like(losses.mse)
        if batch.preserved is not None:  # their distance from the base says nothing of the noise
            hot.index_fill_(0, batch.preserved, 0)
        parts = [losses.total.detach(), losses.mse, losses.bound, preservation]
        values = torch.stack(parts).double()
        self.sums[:4] += values @ batch.weight.double()
        self.sums[5:].view(2, -1)[0] += values[0] @ hot
        self.sums[5:].view(2, -1)[1] += hot.sum(0)
        self.pictures += len(batch.timesteps)

    def add_step(self, gradient_norm: Tensor) -> None:
        """Count one optimizer step."""
        self.sums[4] += gradient_norm
        self.steps += 1

    def read(self, accelerator: Accelerator, batches_a_step: int) -> dict[str, float]:
        """Return the means over all processes since the last reading; waits for the device once.

        Losses are weighted as in training, so ``loss`` is the sum of the parts under ``loss/``.
        """
        sums = accelerator.reduce(self.sums, "mean")
        assert isinstance(sums, Tensor)
        total, mse, bound, preservation, norm, *quarters = sums.tolist()
        batches = self.steps * batches_a_step
        seconds = time.perf_counter() - self.since
        points = {
            "loss": total / batches,
            "loss/mse": mse / batches,
            "loss/bound_bits": bound / batches,
            "gradient_norm": norm / self.steps,
            "pictures_per_second": self.pictures * accelerator.num_processes / seconds,
            "peak_memory_gib": peak_memory_gib(self.sums.device),
        }
        if self.preserves_output:
            points["loss/preservation"] = preservation / batches
        for quarter in range(self.QUARTERS):
            if count := quarters[self.QUARTERS + quarter]:
                points[f"loss_by_noise/quarter_{quarter + 1}"] = quarters[quarter] / count
        self.sums.zero_()
        self.steps = self.pictures = 0
        self.since = time.perf_counter()
        return points

    def skip_time(self, seconds: float) -> None:
        """Leave time not spent training out of the rates."""
        self.since += seconds


class Tracker:
    """TensorBoard and the progress bar of one stage, on the main process only."""

    def __init__(self, accelerator: Accelerator, folder: Path, title: str, first: int, steps: int):
        main = accelerator.is_main_process
        # a continued run hides the points after its checkpoint, as it makes them again
        purge_step = first + 1 if first else None
        self.writer = SummaryWriter(str(folder), purge_step=purge_step) if main else None
        self.bar = tqdm(
            desc=title,
            total=steps,
            initial=first,
            unit="step",
            disable=not main,
            dynamic_ncols=True,
        )

    def text(self, tag: str, text: str) -> None:
        """Add a text panel that keeps line breaks."""
        if self.writer:
            self.writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()))

    def points(self, points: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        self.bar.set_postfix({"loss": f"{points['loss']:.4f}"}, refresh=False)
        if self.writer:
            for tag, value in points.items():
                self.writer.add_scalar(tag, value, step)

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        """Add a picture panel."""
        if self.writer:
            self.writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")
            self.writer.flush()

    def close(self) -> None:
        """Close both, writing pending events."""
        self.bar.close()
        if self.writer:
            self.writer.close()
