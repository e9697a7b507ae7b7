"""The batch of every step, as a function of (seed, position in the run) alone.

A step's pictures form one global batch, over all processes and accumulated batches. Everything
random about a picture is drawn from its position in the run: its noise, timestep, crop, dropped
caption and dropout are the same however the global batch is divided. Nothing here keeps state: any
process can make any batch in any order, so a resumed run sees exactly the batches that it would
have seen without the interruption.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from finetune.data.pictures import Picture, crop, to_tensor
from finetune.recipe.schema import Data, OutputPrior, Prior, Timesteps
from finetune.step.inputs import Batch

Item = TypeVar("Item")

ORDER, DRAWS, MODEL, CLASS, PRESERVED, PROMPTS = range(6)
"""The purposes of random streams: the order of the pictures, a picture's draws, the model's dropout
in a step, the sampling of class pictures, and the pictures and captions whose predictions are
preserved."""


def derived_seed(*key: int) -> int:
    """Derive a seed from all numbers of the key, and from nothing else."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def picture_at(position: int, count: int, seed: int) -> int:
    """Find which of ``count`` pictures is at a position in the endless reshuffled sequence."""
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
    """The class pictures, with a prior of that kind."""
    prior: Prior | None
    prompt_embeds: Mapping[str, Tensor]
    """Text encodings [T, D] by caption, including the empty caption."""
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
    """The number of batches in an optimizer step on each process."""
    rank: int = 0
    world_size: int = 1
    prompts: Sequence[str] = ()
    """The captions to preserve, with a prior of the kind ``output``."""

    @property
    def parts(self) -> int:
        """The number of batches that a global batch is divided into."""
        return self.accumulation * self.world_size

    @property
    def global_size(self) -> int:
        """The number of pictures in an optimizer step, over all processes."""
        return self.batch_size * self.parts

    @property
    def prior_count(self) -> int:
        """The number of pictures of the prior in a global batch: at least one, and never all."""
        return 0 if self.prior is None else self.prior.count_in(self.global_size)

    @property
    def preserves_output(self) -> bool:
        """True if the prior's pictures have the base's prediction as their target."""
        return isinstance(self.prior, OutputPrior)

    @property
    def instance_count(self) -> int:
        """The number of instance pictures in a global batch."""
        return self.global_size - self.prior_count

    def places(self, index: int) -> list[tuple[int, int]]:
        """Return the optimizer step of a batch, with each picture's place in the global batch.

        The global batch holds the instance pictures, then those of the prior. Each of its parts
        takes every ``parts``-th place, so their numbers of the prior's differ by at most one.
        """
        step, micro_step = divmod(index, self.accumulation)
        part = micro_step * self.world_size + self.rank
        return [(step, place) for place in range(part, self.global_size, self.parts)]

    def picture(self, step: int, place: int) -> tuple[Picture, float, float]:
        """Return the picture at a place in a global batch, its loss weight and caption dropout.

        The weight is the one in the global batch times the number of parts, because the parts'
        gradients are averaged.
        """
        count, weight, dropout = self.instance_count, 1.0, self.data.caption_dropout
        if self.prior is None or place < count:
            chosen = picture_at(step * count + place, len(self.pictures), self.seed)
            picture = self.pictures[chosen]
        else:
            place, count, weight = place - count, self.prior_count, self.prior.weight
            picture, dropout = self.prior_picture(step * count + place), self.prior.caption_dropout
        return picture, weight / count * self.parts, dropout

    def prior_picture(self, position: int) -> Picture:
        """Return the picture at a position in the sequence of the prior's pictures."""
        if not self.preserves_output:
            return self.class_pictures[picture_at(position, len(self.class_pictures), self.seed)]

        # orders of their own: neither the instances' beside them, nor a picture's with one prompt
        def draw(items: Sequence[Item], purpose: int) -> Item:
            return items[picture_at(position, len(items), derived_seed(self.seed, purpose))]

        return replace(draw(self.pictures, PRESERVED), caption=draw(self.prompts, PROMPTS))

    def crop_at(self, step: int, place: int) -> Image.Image:
        """Draw the crop of the picture at a place in a global batch, as :meth:`example` does."""
        picture, _, _ = self.picture(step, place)
        return self._crop(picture, np.random.default_rng(self._key(step, place)))

    def _key(self, step: int, place: int) -> int:
        """Derive the seed of all that is drawn for a place in a global batch."""
        return derived_seed(self.seed, DRAWS, step * self.global_size + place)

    def _crop(self, picture: Picture, rng: np.random.Generator) -> Image.Image:
        shift, flip = self.data.center_shift, self.data.horizontal_flip
        return crop(picture, self.size_px, rng, center_shift=shift, horizontal_flip=flip)

    def __call__(self, index: int) -> Batch:
        """Make the batch at an index: the step times the accumulation, plus the micro-step."""
        places = self.places(index)
        rows = [self.example(*place) for place in places]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        preserved = [row for row, (_, place) in enumerate(places) if place >= self.instance_count]
        if self.preserves_output and preserved:
            tensors["preserved"] = torch.tensor(preserved)
        return Batch(**tensors)

    def example(self, step: int, place: int) -> dict[str, Tensor]:
        """Draw one picture's share of each field of a batch, without the batch dimension."""
        picture, weight, dropout = self.picture(step, place)
        key = self._key(step, place)
        rng = np.random.default_rng(key)
        draw = torch.Generator().manual_seed(key)
        image = self._crop(picture, rng)
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
    """Shrink a square picture to the size of the stage below, with the resizing of the crops."""
    return image.resize((size_px, size_px), Image.Resampling.BICUBIC, reducing_gap=None)


def prefetch(
    batches: Batches, indices: range, device: torch.device, ahead: int = 2
) -> Iterator[Batch]:
    """Yield the batches at some indices; for a GPU, made and copied there in the background.

    On a CPU each is made as it is asked for. The cores are busy with the steps, and a thread more
    that computes is one more than there are cores, as OpenMP counts: the threads of the step then
    sleep between its operations, and it takes half as long again.
    """
    if device.type != "cuda":
        yield from (batches(index).to(device) for index in indices)
        return
    copying = torch.cuda.Stream(device)

    def make(index: int) -> Batch:
        batch = batches(index).pin_memory()
        with torch.cuda.stream(copying):
            copied = batch.to(device)
        copying.synchronize()  # this thread waits, so that the step does not have to
        return copied

    with ThreadPoolExecutor(max_workers=ahead) as pool:
        pending = [pool.submit(make, index) for index in indices[:ahead]]
        for index in indices:
            if index + ahead in indices:
                pending.append(pool.submit(make, index + ahead))
            batch = pending.pop(0).result()
            batch.record_stream(torch.cuda.current_stream(device))  # the step may still read it
            yield batch
