"""What the UNet of each stage is shown, in training exactly as at inference.

Shapes: B pictures a batch, S the stage's picture size, s the size of the stage below, T text
tokens, D text width. Pixels are in [-1, 1].
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """All that one training step consumes; every shape is fixed for the whole run.

    The step itself draws nothing: all that is random about a picture is drawn beforehand from
    (seed, position in the run), so a step is a function of these tensors alone.
    """

    pixels: Tensor
    """[B, 3, S, S], the pictures to learn, in [-1, 1]."""
    prompt_embeds: Tensor
    """[B, T, D], text encodings, padding included (IF's UNets attend to all of it)."""
    weight: Tensor
    """[B], each picture's weight in the loss. Over a step's batches on all processes, the weighted
    sums of the losses average to the mean of the instance pictures' losses, and beside it that of
    the class pictures' times ``prior.weight``."""
    noise: Tensor
    """[B, 3, S, S], standard normal."""
    timesteps: Tensor
    """[B] int64, 0 .. num_train_timesteps - 1."""
    low_res: Tensor | None = None
    """[B, 3, s, s], Stage II only: the same pictures as the stage below sees them."""
    low_res_noise: Tensor | None = None
    """[B, 3, S, S], Stage II only: standard normal."""
    noise_level: Tensor | None = None
    """[B] int64, Stage II only: the augmentation level of the low-res picture."""
    dropout_keys: Tensor | None = None
    """[B, 2] int64, the keys of each picture and of the optimizer step, which the adapter's dropout
    derives from (:mod:`unets.dropout`); ``None``: it has none."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that this stage has, by field name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device, copied without waiting where its memory is pinned."""
        moved = {name: t.to(device, non_blocking=True) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """The same batch in pinned host memory."""
        return replace(self, **{name: t.pin_memory() for name, t in self.tensors().items()})

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of a batch that was copied on another stream until this one is done."""
        for tensor in self.tensors().values():
            tensor.record_stream(stream)


def noised(batch: Batch, scheduler: DDPMScheduler) -> Tensor:
    """x_t, the pictures under the forward process (DDPM, eq. 4), [B, 3, S, S]."""
    return scheduler.add_noise(batch.pixels, batch.noise, batch.timesteps)


def upscaled(batch: Batch, scheduler: DDPMScheduler) -> Tensor:
    """The low-res half of Stage II's input, [B, 3, S, S].

    Upsampled and noised as ``IFSuperResolutionPipeline.__call__`` does, step 7.
    """
    assert batch.low_res is not None
    size = batch.pixels.shape[-2:]
    enlarged = F.interpolate(batch.low_res, size, mode="bilinear", align_corners=True)
    return scheduler.add_noise(enlarged, batch.low_res_noise, batch.noise_level)


@dataclass(frozen=True)
class Stage:
    """One stage of the cascade, and how its UNet's input is built."""

    number: int
    schedulers: tuple[str, ...]
    """The pipeline's scheduler components: the picture's, then the low-res picture's."""

    @property
    def name(self) -> str:
        """``stage_1`` or ``stage_2``, as in recipes and in an exported folder."""
        return f"stage_{self.number}"

    @property
    def super_resolution(self) -> bool:
        """Whether the UNet is also shown a low-res picture."""
        return len(self.schedulers) > 1

    def unet_inputs(
        self, batch: Batch, noisy: Tensor, schedulers: tuple[DDPMScheduler, ...], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The UNet's keyword arguments for a batch, as the stage's pipeline builds them.

        ``noisy`` is :func:`noised` of the batch. Noising is done in the pictures' own precision
        and only the result is cast to ``dtype``, the precision of the UNet.
        """
        inputs = {"sample": noisy, "encoder_hidden_states": batch.prompt_embeds}
        if self.super_resolution:
            low_res = upscaled(batch, schedulers[1])
            inputs["sample"] = torch.cat([noisy, low_res], dim=1)
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        if self.super_resolution:
            assert batch.noise_level is not None
            inputs["class_labels"] = batch.noise_level
        return inputs | {"timestep": batch.timesteps}


STAGES: Mapping[int, Stage] = MappingProxyType(
    {
        1: Stage(1, ("scheduler",)),
        2: Stage(2, ("scheduler", "image_noising_scheduler")),
    }
)
