"""Checks that find in seconds, without weights, the mistakes that would stop a run after hours."""

from collections.abc import Mapping

import torch

from adapters.atomic import check_out
from adapters.base.configurations import CONFIG
from adapters.base.source import Source
from adapters.base.stored_unet import StoredUNet
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
        UserError: if a tracker is not installed, cleaning empties a prompt, a folder cannot be
            written, the folder of class pictures, a part of the base or a file of it is missing, or
            as :func:`check_stage`.
    """
    check_trackers(recipe.trackers)
    check_bf16(recipe, device)
    check_cleaning(collect_prompts(recipe), clean_caption=recipe.text.clean_caption)
    if recipe.class_pictures:
        own_folder(recipe.class_pictures)
    check_out(recipe.folder, "folder")
    check_out(recipe.cache, "folder")
    reader = recipe.source(STAGES[1])
    reader.check_text_parts()
    reader.tokenizer()  # is small, and the only part that may be damaged without a sign
    width = reader.files.read_config(f"text_encoder/{CONFIG}")["d_model"]
    shown = [STAGES[2]] if recipe.shows_stage_2 and recipe.stage_2 is None else []
    for stage in (*recipe.trained, *shown):
        check_base(stage, recipe.source(stage), width)
    sections = {
        "prior": recipe.class_pictures,
        "validation": recipe.validation,
        "evaluation": recipe.evaluation,
    }
    samplings = {
        name: section.sampling
        for name, section in sections.items()
        if section is not None and section.sampling is not None
    }
    for stage in shown:
        check_sampling(stage, recipe.source(stage), {"validation": recipe.validation.sampling})
    for stage in recipe.trained:
        check_stage(stage, recipe.training(stage), recipe.source(stage), device)
        check_sampling(stage, recipe.source(stage), samplings)


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


def check_base(stage: Stage, source: Source, text_width: int) -> None:
    """Check that all parts of a stage's model are there and fit, without reading weights.

    Args:
        stage: the stage.
        source: its model.
        text_width: the width of the text encoder's output.

    Raises:
        UserError: if a part, a file or a weight is missing, the UNet reads text encodings of
            another width, or predicts something else than noise.
    """
    source.check_parts()
    if (own := source.unet_config["encoder_hid_dim"]) != text_width:
        raise UserError(
            f"The UNet of {source.name} reads text encodings of width {own}, but Stage I's text"
            f" encoder makes them {text_width} wide; name stages of one cascade."
        )
    predicted = source.scheduler(stage.schedulers[0]).config.prediction_type
    if predicted != "epsilon":
        raise UserError(
            f"The scheduler of {source.name} has the prediction_type {predicted!r}, but only"
            " epsilon, the noise, can be trained; name another base."
        )
    if not source.files.absent_bytes("unet"):  # what is still to be downloaded is checked then
        _ = StoredUNet.of(source).weights  # compares names and shapes with the configuration


def check_sampling(stage: Stage, source: Source, samplings: Mapping[str, Sampling]) -> None:
    """Check that a stage can draw with the settings of some sections of a recipe.

    Raises:
        UserError: if there are more steps, or a higher noise level, than its schedules have.
    """
    for name, sampling in samplings.items():
        try:
            check_steps(stage.number, source.scheduler(stage.schedulers[0]), sampling)
        except UserError as error:
            raise UserError(f"{name}.sampling.{error}") from None
        level = sampling.of(stage.number).noise_level
        if stage.super_resolution and level is not None:
            last = source.scheduler(stage.schedulers[-1]).config.num_train_timesteps - 1
            if level > last:
                raise UserError(
                    f"{name}.sampling.{stage.name}.noise_level must be between 0 and {last}, the"
                    f" timesteps of the base's {stage.schedulers[-1]} (got {level})."
                )


def check_stage(stage: Stage, training: Training, source: Source, device: torch.device) -> None:
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
