"""What would stop a drawing half way, found before it begins."""

from collections.abc import Mapping

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from adapters.cascade.conditioning import Conditioning
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError
from adapters.texts import check_texts

LOW_RES_LIMIT = 2.0
"""How large values of given pictures may be: a scheduler that does not clip leaves some above 1."""


def check_drawing(
    stages: Mapping[int, DiffusionPipeline],
    conditioning: Conditioning,
    sampling: Sampling,
    low_res: Tensor | None,
) -> None:
    """Check that all stages can draw.

    Args:
        stages: the pipelines that are loaded, by number.
        conditioning: what to draw.
        sampling: how.
        low_res: pictures that are enlarged, so that Stage I does not draw.

    Raises:
        UserError: where Stage I is needed and absent, Stage III lacks prompts, numbers or shapes do
            not go together, or a setting exceeds what a stage's scheduler knows.
    """
    if low_res is None and 1 not in stages:
        raise UserError("Stage I was not loaded; load it, or give low_res pictures to enlarge.")
    if low_res is not None and list(stages) == [1]:
        raise UserError("Stage I does not enlarge low_res pictures; load Stage II too.")
    if 3 in stages and 3 not in conditioning.prompts:
        raise UserError("Stage III reads the prompts themselves; hand sample() prompts too.")
    check_texts(text for texts in conditioning.prompts.values() for text in texts)
    _check_encodings(conditioning)
    if low_res is not None:
        _check_low_res(low_res, stages)
        if conditioning.redraw is None and low_res.shape[2] != low_res.shape[3]:
            raise UserError(f"low_res pictures must be square (got {_form(low_res)}); crop them.")
    _check_numbers(conditioning, low_res)
    for number, pipe in stages.items():
        check_steps(number, pipe.scheduler, sampling)
        if number in conditioning.prompt_embeds:
            _check_width(number, pipe, conditioning)
        if number in conditioning.strength:
            _check_strength(number, conditioning.strength[number], sampling)
    levels = _levels(stages)
    for name, level in sampling.model_dump(include=set(levels)).items():
        if level > levels[name]:
            raise UserError(_too_much(name, level, levels[name]))


def check_steps(stage: int, scheduler: SchedulerMixin, sampling: Sampling) -> None:
    """Check that a stage's scheduler has as many steps, and the timesteps that are named.

    Raises:
        UserError: where it has not.
    """
    known = _timesteps(scheduler)
    if sampling.steps(stage) > known:
        raise UserError(_too_much(f"stage_{stage}_steps", sampling.steps(stage), known))
    named = sampling.timesteps(stage)
    if named is not None and named[0] != known - 1:
        raise UserError(
            f"stage_{stage}_timesteps are spaced over {named[0] + 1} training timesteps, but Stage"
            f" {stage} of this cascade has {known}; give stage_{stage}_steps instead."
        )


def _check_numbers(conditioning: Conditioning, low_res: Tensor | None) -> None:
    """There is something to draw, and all that is given has a row for each seed."""
    if not len(conditioning):
        raise UserError("There is nothing to draw; give at least one seed.")
    given = {f"encodings for Stage {n}": len(e) for n, e in conditioning.prompt_embeds.items()}
    given |= {f"prompts for Stage {n}": len(texts) for n, texts in conditioning.prompts.items()}
    given |= {"encodings to lead away from": len(conditioning.negative_embeds)}
    if low_res is not None:
        given |= {"low_res pictures": len(low_res)}
    if conditioning.redraw is not None:
        given |= {"pictures to start from": len(conditioning.redraw)}
    for what, count in given.items():
        if count != len(conditioning):
            raise UserError(
                f"The {what} must be one for each of the {len(conditioning)} seeds (got {count})."
            )


def _check_encodings(conditioning: Conditioning) -> None:
    """Encodings are finite numbers, a row for each token."""
    given = {f"encodings for Stage {n}": e for n, e in conditioning.prompt_embeds.items()}
    given |= {"encodings to lead away from": conditioning.negative_embeds}
    for what, embeds in given.items():
        if not _floats(embeds, 3):
            raise UserError(
                f"The {what} must be floating-point numbers [pictures, tokens, width] (got"
                f" {_form(embeds)}); hand over what encode() returns."
            )
        if not embeds.isfinite().all():
            raise UserError(
                f"The {what} have values that are no finite numbers; encode anew, T5 not in fp16."
            )


def _check_low_res(low_res: Tensor, stages: Mapping[int, DiffusionPipeline]) -> None:
    """Pictures to enlarge are as Stage I draws them: one side, the shorter, is of its size."""
    size = stages[1].unet.config.sample_size if 1 in stages else None
    side = min(low_res.shape[2:]) if _floats(low_res, 4) and low_res.shape[1] == 3 else 0
    if side != (size or max(side, 1)):
        shape = f"[pictures, 3, {size or 'size'}, {size or 'size'}]"
        raise UserError(
            f"low_res must be floating-point numbers {shape} (got {_form(low_res)}); hand over"
            " CascadeImages.low_res, or resize them."
        )
    if not (low_res.abs() <= LOW_RES_LIMIT).all():
        low, high = low_res.min().item(), low_res.max().item()
        raise UserError(f"low_res must be in [-1, 1] (got {low:g} to {high:g}); scale its values.")


def _floats(given: object, dimensions: int) -> bool:
    """Whether it is a tensor of floating-point numbers, of so many dimensions."""
    return isinstance(given, Tensor) and given.is_floating_point() and given.dim() == dimensions


def _form(given: object) -> str:
    """What it is, for messages."""
    if not isinstance(given, Tensor):
        return type(given).__name__
    return f"{given.dtype} {list(given.shape)}"


def _check_width(number: int, pipe: DiffusionPipeline, conditioning: Conditioning) -> None:
    """Encodings are as wide as the UNet's text encoder makes them, and all of one length."""
    embeds, negative = conditioning.prompt_embeds[number], conditioning.negative_embeds
    width = pipe.unet.config.encoder_hid_dim
    if embeds.shape[-1] != width:
        raise UserError(
            f"The encodings for Stage {number} are {embeds.shape[-1]} wide, but its UNet reads"
            f" {width}; make them with the text encoder of this base."
        )
    if embeds.shape != negative.shape:
        raise UserError(
            f"Stage {number}'s encodings have the shape {list(embeds.shape)}, and those to lead"
            f" away from {list(negative.shape)}; make them with one text encoder."
        )


def _check_strength(number: int, strength: float, sampling: Sampling) -> None:
    """At least one step is left to draw from a picture."""
    if int(sampling.steps(number) * strength) < 1:
        raise UserError(
            f"A strength of {strength:g} leaves none of the {sampling.steps(number)} steps of Stage"
            f" {number}; raise one of them."
        )


def _levels(stages: Mapping[int, DiffusionPipeline]) -> dict[str, int]:
    """The largest noise levels, from the schedulers of the stages."""
    levels = {}
    if 2 in stages:
        levels["noise_level"] = _timesteps(stages[2].image_noising_scheduler) - 1
    if 3 in stages:
        levels["stage_3_noise_level"] = stages[3].config.max_noise_level
    return levels


def _too_much(name: str, value: int, limit: int) -> str:
    return f"{name} is {value}, but this cascade allows {limit}; lower it."


def _timesteps(scheduler: SchedulerMixin) -> int:
    return int(scheduler.config.num_train_timesteps)
