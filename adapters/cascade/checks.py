"""Checks made before drawing for errors that would stop it halfway."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import Tensor

from adapters.base.source import Source
from adapters.cascade.conditioning import Conditioning
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError

LOW_RES_LIMIT = 2.0
"""The largest value in given pictures: a scheduler that does not clip leaves some above 1."""

NOISING = "image_noising_scheduler"
"""The component of Stage II with the noise levels of the pictures that it enlarges."""


class Limits(NamedTuple):
    """The limits that a stage sets to its settings."""

    timesteps: int
    """The number of its scheduler's training timesteps."""
    noise_level: int
    """The largest noise level of pictures that it enlarges; 0 for Stage I, which enlarges none."""

    @classmethod
    def of_pipeline(cls, stage: int, pipe: DiffusionPipeline) -> "Limits":
        """Find the limits of a loaded stage."""
        levels = {
            1: lambda: 0,
            2: lambda: pipe.image_noising_scheduler.config.num_train_timesteps - 1,
            3: lambda: pipe.config.max_noise_level,
        }
        return cls(pipe.scheduler.config.num_train_timesteps, levels[stage]())

    @classmethod
    def of_source(cls, source: Source) -> "Limits":
        """Find the limits of a stage that is not loaded, from its configuration files.

        Raises:
            UserError: if these are damaged.
        """

        def count_timesteps(scheduler: str) -> int:
            config = source.files.read_config(f"{scheduler}/{SchedulerMixin.config_name}")
            return int(config.get("num_train_timesteps", 1000))

        with source.files.reading():
            levels = {
                1: lambda: 0,
                2: lambda: count_timesteps(NOISING) - 1,
                3: lambda: int(source.files.index.get("max_noise_level", 350)),
            }
            return cls(count_timesteps("scheduler"), levels[source.stage]())


def check_drawing(
    stages: Mapping[int, DiffusionPipeline],
    sampling: Sampling,
    low_res: Tensor | None,
    strength: Mapping[int, float],
) -> None:
    """Check that all loaded stages can draw; Stage I does not if ``low_res`` is given.

    Args:
        stages: their pipelines, by number.
        sampling: the settings of all stages.
        low_res: pictures to enlarge, [N, 3, s, s] in [-1, 1].
        strength: that of each stage that starts from a picture; empty: none does.

    Raises:
        UserError: if Stage I is needed and absent, shapes do not match, or a setting exceeds the
            limit of a stage's scheduler.
    """
    check_stages(stages, enlarges=low_res is not None)
    if low_res is not None:
        _check_low_res(low_res, stages, square=not strength)
    for number, pipe in stages.items():
        check_settings(number, Limits.of_pipeline(number, pipe), sampling, strength)


def check_stages(stages: Collection[int], *, enlarges: bool) -> None:
    """Check that there are the stages to draw, or to enlarge given pictures.

    Raises:
        UserError: if one is missing.
    """
    if not enlarges and 1 not in stages:
        raise UserError("Stage I was not loaded; load it, or give low_res pictures to enlarge.")
    if enlarges and list(stages) == [1]:
        raise UserError("Stage I does not enlarge low_res pictures; load Stage II too.")


def check_settings(
    stage: int, limits: Limits, sampling: Sampling, strength: Mapping[int, float]
) -> None:
    """Check the settings of a stage against its limits.

    Args:
        stage: its number.
        limits: those of its schedulers.
        sampling: the settings of all stages.
        strength: the share of its steps that each stage takes from a given picture, if it does.

    Raises:
        UserError: if a setting exceeds a limit, or leaves no steps.
    """
    _check_steps(stage, limits.timesteps, sampling)
    level = sampling.of(stage).noise_level
    if level is not None:
        _check_limit(f"stage_{stage}.noise_level", level, limits.noise_level)
    steps, share = sampling.steps(stage), strength.get(stage, 1)
    if int(steps * share) < 1:
        raise UserError(
            f"A strength of {share:g} leaves none of the {steps} steps of Stage {stage}; raise one"
            " of them."
        )


def check_steps(stage: int, scheduler: SchedulerMixin, sampling: Sampling) -> None:
    """Raise a UserError if a stage's scheduler has too few steps, or not the named timesteps."""
    _check_steps(stage, scheduler.config.num_train_timesteps, sampling)


def _check_steps(stage: int, known: int, sampling: Sampling) -> None:
    _check_limit(f"stage_{stage}.steps", sampling.steps(stage), known)
    named = sampling.timesteps(stage)
    if named is not None and named[0] != known - 1:
        raise UserError(
            f"stage_{stage}.timesteps are spaced over {named[0] + 1} training timesteps, but Stage"
            f" {stage} of this cascade has {known}; give stage_{stage}.steps instead."
        )


def _check_limit(setting: str, value: int, limit: int) -> None:
    if value > limit:
        raise UserError(f"{setting} is {value}, but this cascade allows {limit}; lower it.")


def check_small_pictures(
    pictures: Sequence[Image.Image], size_px: int | None, *, square: bool
) -> None:
    """Check pictures to enlarge: they look like Stage I's, whose shorter side has its size.

    Args:
        pictures: one or several.
        size_px: the size of Stage I's pictures; ``None``: it is not loaded, and any size will do.
        square: they must be square, as Stage I's are if it does not start from another picture.

    Raises:
        UserError: if one has another size than it should, or than the others.
    """
    for picture in pictures:
        width, height = picture.size
        side = size_px or min(pictures[0].size)
        wanted = (side, side) if square else pictures[0].size
        if picture.size != wanted or min(picture.size) != side:
            form = f"{side} x {side} px" if square else f"all of one size, {side} px at the least"
            owner = ", the size of Stage I's" if size_px else ""
            raise UserError(
                f"low_res pictures must be {form}{owner} (found {width} x {height} px); crop and"
                " resize them."
            )


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


def check_encodings(stages: Mapping[int, DiffusionPipeline], conditioning: Conditioning) -> None:
    """Check that encodings have the width that Stage I and II expect, and all one length.

    Raises:
        UserError: if they do not.
    """
    for number, pipe in stages.items():
        _check_encodings(number, pipe, conditioning)


def _check_encodings(stage: int, pipe: DiffusionPipeline, conditioning: Conditioning) -> None:
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
