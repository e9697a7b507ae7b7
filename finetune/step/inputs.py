"""The UNet's input in each stage, in training exactly as at inference.

Shapes: B pictures a batch, S the stage's picture size, s the size of the stage below, T text
tokens, D text width. Pixels are in [-1, 1].
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from finetune.step.stages import Stage


@dataclass(frozen=True)
class Batch:
    """All that one training step consumes; every shape is fixed for the whole run.

    A step draws nothing: all that is random about a picture was drawn from (seed, position in the
    run), so a step is a function of these tensors alone.
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
    """[B, 2] int64, the keys of each picture and of the optimizer step that the adapter's dropout
    derives from (:mod:`unets.dropout`); ``None``: no dropout."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are given, by field name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, without waiting for it where the memory is pinned."""
        moved = {name: t.to(device, non_blocking=True) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """Copy to pinned host memory."""
        return replace(self, **{name: t.pin_memory() for name, t in self.tensors().items()})

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of a batch that was copied on another stream until this one is done."""
        for tensor in self.tensors().values():
            tensor.record_stream(stream)


def add_noise(batch: Batch, scheduler: DDPMScheduler) -> Tensor:
    """Return x_t, the pictures under the forward process (DDPM, eq. 4), [B, 3, S, S]."""
    return scheduler.add_noise(batch.pixels, batch.noise, batch.timesteps)


def unet_inputs(
    stage: Stage,
    batch: Batch,
    noisy: Tensor,
    schedulers: tuple[DDPMScheduler, ...],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Build the UNet's keyword arguments for a batch, as the stage's pipeline does.

    ``noisy`` is :func:`add_noise` of the batch. Noise is added in the pictures' own precision, and
    only the result is cast to ``dtype``, the precision of the UNet.
    """
    inputs = {"sample": noisy, "encoder_hidden_states": batch.prompt_embeds}
    labels = {}
    if stage.super_resolution:  # as in IFSuperResolutionPipeline.__call__, step 7
        assert batch.low_res is not None
        assert batch.noise_level is not None
        size = batch.pixels.shape[-2:]
        enlarged = F.interpolate(batch.low_res, size, mode="bilinear", align_corners=True)
        low_res = schedulers[1].add_noise(enlarged, batch.low_res_noise, batch.noise_level)
        inputs["sample"] = torch.cat([noisy, low_res], dim=1)
        labels["class_labels"] = batch.noise_level
    return (
        {name: tensor.to(dtype) for name, tensor in inputs.items()}
        | labels
        | {"timestep": batch.timesteps}
    )
