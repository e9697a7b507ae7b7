"""Losses that compare from one validation to the next: noise, crops and timesteps are fixed.

The training loss jumps about because each point has other pictures, noise and timesteps; here only
the weights change.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from adapters.errors import UserError
from finetune.data.batches import Batches, derived_seed
from finetune.data.pictures import Picture
from finetune.recipe.schema import Timesteps
from finetune.run.trainee import Trainee
from finetune.step.inputs import Batch, add_noise, unet_inputs
from finetune.step.losses import squared_error

TIMESTEPS = 8
"""The number of timesteps at which each picture's loss is measured."""

HELD_OUT = 4
"""The purpose of a random stream, after those of :mod:`finetune.data.batches`: which pictures are
held out."""


class FixedLosses:
    """The losses of some pictures, each at evenly spread timesteps.

    The noise of a timestep is the same for every picture and in every run, so that pictures and
    runs compare. Nothing is drawn from a state, so measuring does not change the training.

    Args:
        batches: the batches of the stage, for its sizes, captions and ranges.
        pictures: the pictures to measure.
    """

    def __init__(self, batches: Batches, pictures: Sequence[Picture]) -> None:
        unchanged = {"center_shift": 0.0, "horizontal_flip": False, "caption_dropout": 0.0}
        self.pictures, self.rows_at_once = pictures, batches.batch_size
        self.rows = [
            replace(
                batches,
                data=batches.data.model_copy(update=unchanged),
                pictures=(picture,),
                class_pictures=(),
                prior=None,
                seed=0,
                timesteps=Timesteps(low=timestep, high=timestep),
                batch_size=1,
                accumulation=1,
                rank=0,
                world_size=1,
            )
            for picture in pictures
            for timestep in spread_timesteps(batches.timesteps, batches.num_train_timesteps)
        ]

    @torch.no_grad()
    def __call__(self, trainee: Trainee) -> list[float]:
        """Measure each picture's loss with the weights that a trainee's UNet has now.

        As many rows are computed at once as training has in a batch, so this takes less memory than
        training; the losses depend on that number no more than by rounding.
        """
        losses = []
        for start in range(0, len(self.rows), self.rows_at_once):
            at_once = range(start, min(start + self.rows_at_once, len(self.rows)))
            losses.append(self._measure([self._row(index) for index in at_once], trainee))
        by_picture = torch.cat(losses).view(len(self.pictures), -1).mean(dim=1)
        return [float(loss) for loss in by_picture.tolist()]

    def _row(self, index: int) -> dict[str, Tensor]:
        # the step of the only picture decides its noise, and is its timestep's number
        return self.rows[index].example(index % TIMESTEPS, 0)

    def _measure(self, rows: list[dict[str, Tensor]], trainee: Trainee) -> Tensor:
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        batch = Batch(**stacked).to(trainee.unet.device)
        noisy = add_noise(batch, trainee.schedulers[0])
        unet = trainee.unet
        inputs = unet_inputs(trainee.stage, batch, noisy, trainee.schedulers, unet.dtype)
        prediction: Tensor = unet(**inputs, return_dict=False)[0]
        return squared_error(prediction[:, :3].float(), batch.noise)


def spread_timesteps(timesteps: Timesteps, count: int) -> list[int]:
    """Spread :data:`TIMESTEPS` timesteps evenly over the range that is trained, below ``count``."""
    high = count - 1 if timesteps.high is None else timesteps.high
    width = (high + 1 - timesteps.low) / TIMESTEPS
    return [timesteps.low + int((at + 0.5) * width) for at in range(TIMESTEPS)]


def check_held_out(held_out: int, pictures: int) -> None:
    """Raise a UserError if no picture would be left to train on."""
    if held_out >= pictures:
        raise UserError(
            f"validation.held_out must be less than the number of pictures, {pictures} (got"
            f" {held_out})."
        )


def hold_out(
    pictures: Sequence[Picture], count: int, seed: int
) -> tuple[list[Picture], list[Picture]]:
    """Divide pictures into those to train on and ``count`` others, drawn by the seed alone."""
    order = np.random.default_rng(derived_seed(seed, HELD_OUT)).permutation(len(pictures))
    held_out = set(order[:count].tolist())
    parts: tuple[list[Picture], list[Picture]] = ([], [])
    for index, picture in enumerate(pictures):
        parts[index in held_out].append(picture)
    return parts


def select_evenly(pictures: Sequence[Picture], most: int) -> list[Picture]:
    """Select at most some number of pictures, evenly spread over all."""
    count = min(most, len(pictures))
    return [pictures[index * len(pictures) // count] for index in range(count)]
