"""Checks made before drawing for errors that would stop it halfway."""

from collections.abc import Mapping

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from adapters.cascade.conditioning import Conditioning
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError

LOW_RES_LIMIT = 2.0
"""The largest value in given pictures: a scheduler that does not clip leaves some above 1."""


def check_drawing(
    stages: Mapping[int, DiffusionPipeline],
    conditioning: Conditioning,
    sampling: Sampling,
    low_res: Tensor | None,
) -> None:
    """Check that all loaded stages can draw; Stage I does not if ``low_res`` is given.

    Raises:
        UserError: if Stage I is needed and absent, shapes do not match, or a setting exceeds the
            limit of a stage's scheduler.
    """
    if low_res is None and 1 not in stages:
        raise UserError("Stage I was not loaded; load it, or give low_res pictures to enlarge.")
    if low_res is not None:
        if list(stages) == [1]:
            raise UserError("Stage I does not enlarge low_res pictures; load Stage II too.")
        _check_low_res(low_res, stages, square=conditioning.redraw is None)
    for number, pipe in stages.items():
        check_steps(number, pipe.scheduler, sampling)
        if number in conditioning.prompt_embeds:
            _check_encodings(number, pipe, conditioning)
        _check_noise_level(number, pipe, sampling)
        steps, strength = sampling.steps(number), conditioning.strength.get(number, 1)
        if int(steps * strength) < 1:
            raise UserError(
                f"A strength of {strength:g} leaves none of the {steps} steps of Stage {number};"
                " raise one of them."
            )


def check_steps(stage: int, scheduler: SchedulerMixin, sampling: Sampling) -> None:
    """Raise a UserError if a stage's scheduler has too few steps, or not the named timesteps."""
    known = scheduler.config.num_train_timesteps
    _check_limit(f"stage_{stage}.steps", sampling.steps(stage), known)
    named = sampling.timesteps(stage)
    if named is not None and named[0] != known - 1:
        raise UserError(
            f"stage_{stage}.timesteps are spaced over {named[0] + 1} training timesteps, but Stage"
            f" {stage} of this cascade has {known}; give stage_{stage}.steps instead."
        )


def _check_noise_level(stage: int, pipe: DiffusionPipeline, sampling: Sampling) -> None:
    level = sampling.of(stage).noise_level
    if level is not None:
        if stage == 3:
            limit = pipe.config.max_noise_level
        else:
            limit = pipe.image_noising_scheduler.config.num_train_timesteps - 1
        _check_limit(f"stage_{stage}.noise_level", level, limit)


def _check_limit(setting: str, value: int, limit: int) -> None:
    if value > limit:
        raise UserError(f"{setting} is {value}, but this cascade allows {limit}; lower it.")


def _check_low_res(
    low_res: Tensor, stages: Mapping[int, DiffusionPipeline], *, square: bool
) -> None:
    """Check that pictures to enlarge look like Stage I's: their shorter side has its size."""
    size = stages[1].unet.config.sample_size if 1 in stages else None
    form = f"{low_res.dtype} {list(low_res.shape)}"
    fits = low_res.is_floating_point() and low_res.dim() == 4 and low_res.shape[1] == 3
    if not fits or min(low_res.shape[2:]) != (size or max(min(low_res.shape[2:]), 1)):
        shape = f"[pictures, 3, {size or 'size'}, {size or 'size'}]"
        raise UserError(
            f"low_res must be a floating-point tensor of shape {shape} (got {form}); pass"
            " CascadeImages.low_res, or resize the pictures."
        )
    if square and low_res.shape[2] != low_res.shape[3]:
        raise UserError(f"low_res pictures must be square (got {form}); crop them.")
    if not (low_res.abs() <= LOW_RES_LIMIT).all():
        low, high = low_res.min().item(), low_res.max().item()
        raise UserError(f"low_res must be in [-1, 1] (got {low:g} to {high:g}); scale its values.")


def _check_encodings(stage: int, pipe: DiffusionPipeline, conditioning: Conditioning) -> None:
    """Check that encodings have the width that the UNet expects, and all one length."""
    embeds, negative = conditioning.prompt_embeds[stage], conditioning.negative_embeds
    width = pipe.unet.config.encoder_hid_dim
    if embeds.shape[-1] != width:
        raise UserError(
            f"The encodings for Stage {stage} are {embeds.shape[-1]} wide, but its UNet reads"
            f" {width}; make them with the text encoder of this base."
        )
    if embeds.shape != negative.shape:
        raise UserError(
            f"Stage {stage}'s encodings have the shape {list(embeds.shape)}, and those of negative"
            f" prompts {list(negative.shape)}; make them with one text encoder."
        )
