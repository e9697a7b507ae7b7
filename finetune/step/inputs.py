"""The UNet's input in each stage, exactly the same in training as at inference.

Shapes: B pictures in a batch, S the stage's picture size, s the size of the stage below, T text
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

    A step draws nothing: everything random about a picture was drawn from (seed, position in the
    run), so a step is a function of these tensors alone.
    """

    pixels: Tensor
    """The pictures to learn, [B, 3, S, S] in [-1, 1]."""
    prompt_embeds: Tensor
    """The text encodings, [B, T, D], padding included (IF's UNets attend to all of it)."""
    weight: Tensor
    """Each picture's weight in the loss, [B]. Over a step's batches on all processes, the weighted
    sums of the losses average to the instance pictures' mean loss plus ``prior.weight`` times the
    mean loss of the prior's pictures."""
    noise: Tensor
    """Standard normal noise, [B, 3, S, S]."""
    timesteps: Tensor
    """Timesteps, [B] int64, 0 .. num_train_timesteps - 1."""
    low_res: Tensor | None = None
    """The same pictures at the size of the stage below, [B, 3, s, s]; Stage II only."""
    low_res_noise: Tensor | None = None
    """Standard normal noise for the low-res pictures, [B, 3, S, S]; Stage II only."""
    noise_level: Tensor | None = None
    """The low-res pictures' augmentation levels, [B] int64; Stage II only."""
    dropout_keys: Tensor | None = None
    """The keys of each picture and of the optimizer step, [B, 2] int64, from which the adapter's
    dropout derives (:mod:`unets.dropout`); ``None``: no dropout."""
    preserved: Tensor | None = None
    """The indices of the rows whose target is the base's own prediction, [k] int64, 0 < k <= B;
    ``None``: there are none."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are given, by field name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, without waiting for the copy if the memory is pinned."""
        moved = {name: t.to(device, non_blocking=True) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """Copy to pinned host memory."""
        return replace(self, **{name: t.pin_memory() for name, t in self.tensors().items()})

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of a batch copied on another stream until ``stream`` is done with it."""
        for tensor in self.tensors().values():
            tensor.record_stream(stream)


def add_noise(batch: Batch, scheduler: DDPMScheduler) -> Tensor:
    """Return x_t, the pictures after the forward process (DDPM, eq. 4), [B, 3, S, S]."""
    return scheduler.add_noise(batch.pixels, batch.noise, batch.timesteps)


def unet_inputs(
    stage: Stage,
    batch: Batch,
    noisy: Tensor,
    schedulers: tuple[DDPMScheduler, ...],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Build the UNet's keyword arguments for a batch, as the stage's pipeline does.

    ``noisy`` is the batch's :func:`add_noise`. Noise is added in the pictures' own precision, and
    only the result is cast to ``dtype``, the UNet's precision.
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
