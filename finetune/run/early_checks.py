"""Checks that find in seconds, without weights, the mistakes that would stop a run after hours."""

from collections.abc import Collection

import torch

from adapters.base.source import Source
from adapters.cascade.checks import check_steps
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError, listed
from adapters.weights.kinds import peft_config
from finetune.data.captions import check_cleaning, collect_prompts
from finetune.data.prior import own_folder
from finetune.recipe.schema import Recipe, Training
from finetune.run.other_trackers import check_trackers
from finetune.step.optimizers import OPTIMIZERS
from finetune.step.stages import STAGES, Stage
from unets.loading import empty_unet

WITH_BF16 = (8, 0)
"""The compute capability of the first GPUs that have bf16, Ampere's."""


def check_recipe(recipe: Recipe, device: torch.device) -> None:
    """Find in seconds, without weights, the mistakes that would stop a run after hours.

    Raises:
        UserError: if a tracker is not installed, cleaning empties a prompt, the folder of class
            pictures or a Stage II to show validation pictures through is missing, or as
            :func:`check_stage`.
    """
    check_trackers(recipe.trackers)
    check_bf16(recipe, device)
    check_cleaning(collect_prompts(recipe), clean_caption=recipe.text.clean_caption)
    if recipe.class_pictures:
        own_folder(recipe.class_pictures)
    sections = (recipe.class_pictures, recipe.validation, recipe.evaluation)
    samplings = [section.sampling for section in sections if section and section.sampling]
    if recipe.shows_stage_2 and recipe.stage_2 is None:
        above = recipe.source(STAGES[2])
        empty_unet(above.unet_config, "fp32", torch.device("cpu"))
        check_steps(2, above.scheduler(STAGES[2].schedulers[0]), recipe.validation.sampling)
    for stage in recipe.trained:
        check_stage(stage, recipe.training(stage), recipe.source(stage), samplings, device)


def check_bf16(recipe: Recipe, device: torch.device) -> None:
    """Raise a UserError if a model would compute in bf16 on a GPU that can only emulate it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= WITH_BF16:
        return
    chosen = {f"{stage.name}.precision": recipe.training(stage) for stage in recipe.trained}
    lacking = [name for name, each in chosen.items() if each.precision_on(device) != "fp32"]
    if recipe.text.device != "cpu" and recipe.text.precision_on(device) != "fp32":
        lacking.append("text.precision")
    if lacking:
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"This GPU, {name}, has no bf16, in which {listed(lacking)} would compute (int8 and nf4"
            " do too): set each to fp32. In 16 GB fp32 can train DeepFloyd/IF-I-L-v1.0 and"
            " DeepFloyd/IF-II-M-v1.0, with text.device: cpu."
        )


def check_stage(
    stage: Stage,
    training: Training,
    source: Source,
    samplings: Collection[Sampling],
    device: torch.device,
) -> None:
    """Check a stage's settings against its base and the device.

    Raises:
        UserError: if the base is missing or of another stage, a target matches no module, a setting
            needs a GPU, or noise levels or timesteps are outside the base's schedule.
    """
    unet = empty_unet(source.unet_config, "fp32", torch.device("cpu"))
    peft_config(unet, training.adapter)
    optimizer = training.optimizer.name
    for setting, needs_gpu, advice in (
        ("compile: true", training.compile, "leave it out"),
        (f"optimizer.name: {optimizer}", OPTIMIZERS[optimizer].needs_gpu, "use adamw_8bit"),
    ):
        if needs_gpu and device.type == "cpu":
            raise UserError(
                f"{stage.name}.{setting} needs a GPU, but this run uses none: {advice}."
            )
    timesteps, levels = training.timesteps, training.noise_level or (0, 0)
    for setting, given, largest, name in (
        ("timesteps.low", timesteps.low, timesteps.low, stage.schedulers[0]),
        ("timesteps.high", timesteps.high, timesteps.high or 0, stage.schedulers[0]),
        ("noise_level", list(levels), max(levels), stage.schedulers[-1]),
    ):
        last = source.scheduler(name).config.num_train_timesteps - 1
        if largest > last:
            raise UserError(
                f"{stage.name}.{setting} must be between 0 and {last}, the timesteps of the base's"
                f" {name} (got {given})."
            )
    for sampling in samplings:
        check_steps(stage.number, source.scheduler(stage.schedulers[0]), sampling)
