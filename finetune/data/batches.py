"""The batch of every step, as a function of (seed, position in the run) alone.

A step's pictures are one global batch, that of all processes and accumulated batches together. All
that is random about a picture is drawn from its position in the run: noise, timestep, crop, dropped
caption and dropout are the same however the global batch is divided. Nothing here keeps state: any
process can make any batch in any order, so a resumed run sees exactly what it would have seen.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from finetune.data.pictures import Picture, crop, to_tensor
from finetune.recipe.schema import Data, Prior, Timesteps
from finetune.step.inputs import Batch

ORDER, DRAWS, MODEL, CLASS = range(4)
"""The purpose of a random stream: the order of the pictures, a picture's draws, the model's dropout
in a step, sampling class pictures."""


def derived_seed(*key: int) -> int:
    """Derive a seed from every number of the key, and from nothing else."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def picture_at(position: int, count: int, seed: int) -> int:
    """The index of the picture, of ``count``, at a position of the endless reshuffled sequence."""
    epoch, place = divmod(position, count)
    return int(_order(epoch, count, seed)[place])


@lru_cache(maxsize=8)
def _order(epoch: int, count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(derived_seed(seed, ORDER, epoch)).permutation(count)


@dataclass(frozen=True)
class Batches:
    """The batches of one stage on one process."""

    data: Data
    pictures: Sequence[Picture]
    """The instance pictures."""
    class_pictures: Sequence[Picture]
    """The class pictures, with prior preservation."""
    prior: Prior | None
    prompt_embeds: Mapping[str, Tensor]
    """Caption to text encoding, [T, D]; the empty caption included."""
    batch_size: int
    size_px: int
    """The stage's picture size."""
    low_res_px: int | None
    """The picture size of the stage below; ``None`` in Stage I."""
    noise_level: tuple[int, int]
    """The range of augmentation levels, inclusive."""
    num_train_timesteps: int
    seed: int
    timesteps: Timesteps = field(default_factory=Timesteps)
    """The distribution of the timesteps."""
    accumulation: int = 1
    """Batches of an optimizer step on each process."""
    rank: int = 0
    world_size: int = 1

    @property
    def parts(self) -> int:
        """The number of batches that a global batch is divided into."""
        return self.accumulation * self.world_size

    @property
    def global_size(self) -> int:
        """The number of pictures of an optimizer step, on all processes."""
        return self.batch_size * self.parts

    @property
    def class_count(self) -> int:
        """The number of class pictures in a global batch: at least one, and never all."""
        if self.prior is None:
            return 0
        return min(max(round(self.global_size * self.prior.share), 1), self.global_size - 1)

    def places(self, index: int) -> list[tuple[int, int]]:
        """The optimizer step of a batch and, for each picture, its place in the global batch.

        The global batch holds the instance pictures, then the class pictures. A part takes every
        ``parts``-th place, so the parts' shares of class pictures differ by one picture at most.
        """
        step, micro_step = divmod(index, self.accumulation)
        part = micro_step * self.world_size + self.rank
        return [(step, place) for place in range(part, self.global_size, self.parts)]

    def picture(self, step: int, place: int) -> tuple[Picture, float, float]:
        """The picture at a place of a step's global batch, its loss weight and caption dropout.

        Weights are those of the global batch, times the parts whose gradients are averaged.
        """
        pictures, weight, dropout = self.pictures, 1.0, self.data.caption_dropout
        count = self.global_size - self.class_count
        if self.prior is not None and place >= count:
            place, count = place - count, self.class_count
            pictures, weight = self.class_pictures, self.prior.weight
            dropout = self.prior.caption_dropout
        chosen = picture_at(step * count + place, len(pictures), self.seed)
        return pictures[chosen], weight / count * self.parts, dropout

    def __call__(self, index: int) -> Batch:
        """Make the batch of an index: the step times the accumulation, plus the micro-step."""
        rows = [self.example(*place) for place in self.places(index)]
        return Batch(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    def example(self, step: int, place: int) -> dict[str, Tensor]:
        """Draw all that a batch holds of one picture, by field, without the batch's dimension."""
        picture, weight, dropout = self.picture(step, place)
        key = derived_seed(self.seed, DRAWS, step * self.global_size + place)
        rng = np.random.default_rng(key)
        draw = torch.Generator().manual_seed(key)
        image = crop(
            picture,
            self.size_px,
            rng,
            center_shift=self.data.center_shift,
            horizontal_flip=self.data.horizontal_flip,
        )
        caption = "" if rng.random() < dropout else picture.caption
        pixels = to_tensor(image)
        timestep = self.timesteps.draw(rng, self.num_train_timesteps)
        example = {
            "pixels": pixels,
            "prompt_embeds": self.prompt_embeds[caption],
            "weight": torch.tensor(weight),
            "noise": torch.randn(pixels.shape, generator=draw),
            "timesteps": torch.tensor(timestep),
            "dropout_keys": torch.tensor([key, derived_seed(self.seed, MODEL, step)]),
        }
        if self.low_res_px is not None:
            low, high = self.noise_level
            example |= {
                "low_res": to_tensor(shrink(image, self.low_res_px)),
                "low_res_noise": torch.randn(pixels.shape, generator=draw),
                "noise_level": torch.tensor(rng.integers(low, high, endpoint=True)),
            }
        return example


def shrink(image: Image.Image, size_px: int) -> Image.Image:
    """Shrink a square picture to the size of the stage below, resized as the data is."""
    return image.resize((size_px, size_px), Image.Resampling.BICUBIC, reducing_gap=None)


def prefetch(
    batches: Batches, indices: range, device: torch.device, ahead: int = 2
) -> Iterator[Batch]:
    """Yield the batches of some indices, made and copied to the device in the background."""
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make(index: int) -> Batch:
        batch = batches(index)
        if copying is None:
            return batch.to(device)
        with torch.cuda.stream(copying):
            copied = batch.pin_memory().to(device)
        copying.synchronize()  # this thread waits, so that the step does not have to
        return copied

    with ThreadPoolExecutor(max_workers=ahead) as pool:
        pending = [pool.submit(make, index) for index in indices[:ahead]]
        for index in indices:
            if index + ahead in indices:
                pending.append(pool.submit(make, index + ahead))
            batch = pending.pop(0).result()
            if copying is not None:  # its memory is not reused before the step has read it
                batch.record_stream(torch.cuda.current_stream(device))
            yield batch
