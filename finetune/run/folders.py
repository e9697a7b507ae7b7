"""A run on disk: where it writes, what it continues from, and what would stop it later on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDPMScheduler
from pydantic import ValidationError
from torch import nn

from adapters.cascade.checks import check_steps
from adapters.errors import UserError
from adapters.files.info import read_info
from adapters.weights.kinds import peft_config
from finetune.data.captions import check_cleaning, collect_prompts
from finetune.data.prior import own_folder
from finetune.recipe.schema import Recipe, Timesteps, Training
from finetune.run.checkpoints import checkpoints, load_checkpoint
from finetune.run.trainee import Trainee, optimizer_of
from finetune.step.flat_weights import FlatWeights
from finetune.step.stages import Stage
from unets.loading import empty_unet


@dataclass(frozen=True)
class Folders:
    """Where a run writes."""

    run: Path

    @property
    def adapters(self) -> Path:
        """The exported adapters, what the user keeps."""
        return self.run / "adapters"

    def checkpoints(self, stage: Stage) -> Path:
        """The checkpoints of a stage."""
        return self.run / "checkpoints" / stage.name

    def logs(self, stage: Stage) -> Path:
        """The TensorBoard events of a stage."""
        return self.run / "logs" / stage.name


def check_recipe(recipe: Recipe) -> None:
    """Find what would stop a run after hours before it begins: without weights, in seconds.

    Raises:
        UserError: where a base is missing or of another stage, a target matches nothing, the
            optimizer does not run here, noise levels, timesteps to draw or timesteps to sample
            are not the schedule's, there is no folder of class pictures where one is named, or
            cleaning empties a prompt.
    """
    check_cleaning(collect_prompts(recipe), clean_caption=recipe.text.clean_caption)
    if recipe.prior:
        own_folder(recipe.prior)
    sections = (recipe.prior, recipe.validation, recipe.comparison)
    samplings = [section.sampling for section in sections if section and section.sampling]
    for stage in recipe.trained:
        source, training = recipe.source(stage), recipe.training(stage)
        assert source.picture_size_px > 0
        unet = empty_unet(source.unet_config, "fp32", torch.device("cpu"))
        peft_config(unet, training.adapter)
        optimizer_of(
            training.optimizer, FlatWeights({"": nn.Parameter(torch.zeros(1))}, unet.dtype)
        )
        noise_levels(training, source.scheduler(stage.schedulers[-1]))
        timesteps_of(training, stage, source.scheduler(stage.schedulers[0]))
        for sampling in samplings:
            check_steps(stage.number, source.scheduler(stage.schedulers[0]), sampling)


def noise_levels(training: Training, scheduler: DDPMScheduler) -> tuple[int, int]:
    """The range of Stage II's augmentation levels, inclusive.

    Raises:
        UserError: where the recipe's range goes beyond the low-res picture's schedule.
    """
    last = scheduler.config.num_train_timesteps - 1
    low, high = training.noise_level or (0, last)
    if high > last:
        raise UserError(
            f"stage_2.noise_level must be within 0 and {last}, the levels of the base's"
            f" image_noising_scheduler (got [{low}, {high}])."
        )
    return low, high


def timesteps_of(training: Training, stage: Stage, scheduler: DDPMScheduler) -> Timesteps:
    """The distribution of a stage's timesteps.

    Raises:
        UserError: where the recipe's range goes beyond the base's schedule.
    """
    last = scheduler.config.num_train_timesteps - 1
    timesteps = training.timesteps
    for end, timestep in (("low", timesteps.low), ("high", timesteps.high or 0)):
        if timestep > last:
            raise UserError(
                f"{stage.name}.timesteps.{end} must be at most {last}, the last timestep of the"
                f" base's scheduler (got {timestep})."
            )
    return timesteps


def identity(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What must stay the same for a run to be continued."""
    free = {"steps", "checkpoint_every", "keep_checkpoints", "cuda_graph", "compile"}
    parts = recipe.model_dump(mode="json", include={"seed", "base", "data", "prior", "text"})
    return parts | {stage.name: recipe.training(stage).model_dump(mode="json", exclude=free)}


def check_same(recipe: Recipe, stage: Stage, saved: Mapping[str, Any], where: Path) -> None:
    """Raise a UserError where what was saved is of another recipe."""
    changed = [key for key, value in identity(recipe, stage).items() if saved.get(key) != value]
    if changed:
        raise UserError(
            f"{where} was made with another recipe ({', '.join(changed)} differ): give the recipe"
            f" a new name, or delete {recipe.folder} to start over."
        )


def finished(recipe: Recipe, stage: Stage) -> bool:
    """Whether a stage has been trained to its last step and exported.

    Raises:
        UserError: where the exported adapter, or the newest checkpoint, is of another recipe, or
            where the checkpoints to continue from are gone.
    """
    folders = Folders(recipe.folder)
    adapter, saved = folders.adapters / stage.name, checkpoints(folders.checkpoints(stage))
    if saved:
        check_same(recipe, stage, load_checkpoint(saved[-1][1])["recipe"], saved[-1][1])
    if not adapter.is_dir():
        return False
    info = read_info(adapter)
    try:
        exported = identity(Recipe.model_validate(yaml.safe_load(info.recipe)), stage)
    except (ValidationError, AssertionError):
        exported = {}
    check_same(recipe, stage, exported, adapter)
    steps = recipe.training(stage).steps
    if info.step < steps and not saved:
        raise UserError(
            f"{adapter} was trained for {info.step} of {steps} steps and its checkpoints are gone:"
            f" give the recipe a new name, or delete {recipe.folder} to start over."
        )
    return info.step >= steps


def resume(trainee: Trainee, root: Path) -> None:
    """Continue from the newest checkpoint below ``root``, if there is one."""
    if saved := checkpoints(root):
        trainee.load_state(load_checkpoint(saved[-1][1]))
