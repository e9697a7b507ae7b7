"""The batch of every step, as a function of (seed, rank, step) alone.

Nothing here keeps state: any step's batch can be made in any order, on any process, so a run that
is continued sees exactly what it would have seen.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from finetune.data import Picture, crop, to_tensor
from finetune.recipe import Data, Prior
from finetune.stages import Batch

ORDER, DRAWS, MODEL, CLASS = range(4)
"""What a random stream is for: the order of the pictures, a batch's draws, dropout in the model,
sampling class pictures."""


def derived_seed(*key: int) -> int:
    """A seed that depends on every number of the key, and on nothing else."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def picture_at(position: int, count: int, seed: int) -> int:
    """Which of ``count`` pictures stands at a position of the endless reshuffled sequence."""
    epoch, place = divmod(position, count)
    return int(_order(epoch, count, seed)[place])


@lru_cache(maxsize=8)
def _order(epoch: int, count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(derived_seed(seed, ORDER, epoch)).permutation(count)


@dataclass(frozen=True)
class Batches:
    """Makes batches for one stage on one process."""

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
    rank: int = 0
    world_size: int = 1

    @property
    def class_count(self) -> int:
        """How many pictures of a batch are class pictures."""
        if self.prior is None:
            return 0
        return min(max(round(self.batch_size * self.prior.share), 1), self.batch_size - 1)

    def weight(self) -> Tensor:
        """The loss weight of each place in the batch, [B]."""
        classes = self.class_count
        instances = self.batch_size - classes
        weights = [1 / instances] * instances
        if self.prior is not None:
            weights += [self.prior.weight / classes] * classes
        return torch.tensor(weights)

    def chosen(self, index: int) -> list[Picture]:
        """The pictures of a batch: the instance pictures, then the class pictures."""
        places = []
        for pictures, count in (
            (self.pictures, self.batch_size - self.class_count),
            (self.class_pictures, self.class_count),
        ):
            first = (index * self.world_size + self.rank) * count
            places += [
                pictures[picture_at(position, len(pictures), self.seed)]
                for position in range(first, first + count)
            ]
        return places

    def __call__(self, index: int) -> Batch:
        """The batch of an index: the step times the accumulation, plus the micro-step."""
        key = derived_seed(self.seed, DRAWS, self.rank, index)
        rng = np.random.default_rng(key)
        draw = torch.Generator().manual_seed(key)
        pictures = self.chosen(index)
        crops = [
            crop(
                picture,
                self.size_px,
                rng,
                center_shift=self.data.center_shift,
                horizontal_flip=self.data.horizontal_flip,
            )
            for picture in pictures
        ]
        dropped = rng.random(len(pictures)) < self.data.caption_dropout
        captions = ["" if drop else p.caption for p, drop in zip(pictures, dropped, strict=True)]
        pixels = torch.stack([to_tensor(image) for image in crops])
        low_res = low_res_noise = noise_level = None
        noise = torch.randn(pixels.shape, generator=draw)
        timesteps = torch.randint(self.num_train_timesteps, (len(pictures),), generator=draw)
        if self.low_res_px is not None:
            low_res = torch.stack([to_tensor(shrink(image, self.low_res_px)) for image in crops])
            low_res_noise = torch.randn(pixels.shape, generator=draw)
            low, high = self.noise_level
            noise_level = torch.randint(low, high + 1, (len(pictures),), generator=draw)
        return Batch(
            pixels=pixels,
            prompt_embeds=torch.stack([self.prompt_embeds[caption] for caption in captions]),
            weight=self.weight(),
            noise=noise,
            timesteps=timesteps,
            low_res=low_res,
            low_res_noise=low_res_noise,
            noise_level=noise_level,
        )


def shrink(image: Image.Image, size_px: int) -> Image.Image:
    """A square picture as the stage below has it, resized as the data is."""
    return image.resize((size_px, size_px), Image.Resampling.BICUBIC, reducing_gap=None)


def prefetch(
    batches: Batches, indices: range, device: torch.device, ahead: int = 2
) -> Iterator[Batch]:
    """The batches of some indices in turn, on the device, made and copied in the background."""
    copying = None
    if device.type == "cuda":
        copying = torch.cuda.Stream(device)

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
            if copying is not None:
                batch.record_stream(torch.cuda.current_stream(device))
            yield batch
