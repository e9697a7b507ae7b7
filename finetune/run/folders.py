"""A run on disk, and the checks that precede it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from adapters.base.source import Source
from adapters.cascade.checks import check_steps
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError
from adapters.files.info import read_info
from adapters.weights.kinds import peft_config
from finetune.data.captions import check_cleaning, collect_prompts
from finetune.data.prior import own_folder
from finetune.recipe.schema import Recipe, Training
from finetune.run.checkpoints import list_checkpoints, load_checkpoint
from finetune.step.optimizers import OPTIMIZERS
from finetune.step.stages import Stage
from unets.loading import empty_unet

SHARED = ("seed", "base", "data", "prior", "text")
"""The parts of a recipe that every stage depends on."""

FREE = ("steps", "checkpoint_every", "keep_checkpoints", "cuda_graph", "compile")
"""The settings of a stage that may change before its run continues."""


@dataclass(frozen=True)
class Folders:
    """The folders that a run writes."""

    run: Path

    @property
    def adapters(self) -> Path:
        """The exported adapters, which the user keeps."""
        return self.run / "adapters"

    def checkpoints(self, stage: Stage) -> Path:
        """The checkpoints of a stage."""
        return self.run / "checkpoints" / stage.name

    def logs(self, stage: Stage) -> Path:
        """The TensorBoard events of a stage."""
        return self.run / "logs" / stage.name


def check_recipe(recipe: Recipe, device: torch.device) -> None:
    """Find in seconds, without weights, the mistakes that would stop a run after hours.

    Raises:
        UserError: if cleaning empties a prompt, the folder of class pictures is missing, or a stage
            cannot be trained as :func:`check_stage` says.
    """
    check_cleaning(collect_prompts(recipe), clean_caption=recipe.text.clean_caption)
    if recipe.prior:
        own_folder(recipe.prior)
    sections = (recipe.prior, recipe.validation, recipe.comparison)
    samplings = [section.sampling for section in sections if section and section.sampling]
    for stage in recipe.trained:
        check_stage(stage, recipe.training(stage), recipe.source(stage), samplings, device)


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
            needs a GPU, or noise levels or timesteps are not those of the base's schedule.
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
                f"{stage.name}.{setting} needs a GPU, and this run uses none: {advice}."
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
                f"{stage.name}.{setting} must be within 0 and {last}, the timesteps of the base's"
                f" {name} (got {given})."
            )
    for sampling in samplings:
        check_steps(stage.number, source.scheduler(stage.schedulers[0]), sampling)


def select_identity(recipe: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """The settings of a dumped recipe that must stay the same for a stage's run to continue."""
    section = recipe[stage.name] or {}
    own = {name: value for name, value in section.items() if name not in FREE}
    return {name: recipe[name] for name in SHARED} | {stage.name: own}


def check_same(
    identity: Mapping[str, Any], saved: Mapping[str, Any], place: Path, run: Path
) -> None:
    """Raise a UserError if the identity saved at a place in a run is that of another recipe."""
    changed = [key for key, value in identity.items() if saved.get(key) != value]
    if changed:
        raise UserError(
            f"{place} was made with another recipe ({', '.join(changed)} differ): give the recipe"
            f" a new name, or delete {run} to start over."
        )


def is_finished(stage: Stage, steps: int, identity: Mapping[str, Any], folders: Folders) -> bool:
    """Tell whether a stage has been trained to its last step and exported.

    Raises:
        UserError: if the exported adapter or the newest checkpoint is of another recipe, or the
            checkpoints to continue from are gone.
    """
    adapter = folders.adapters / stage.name
    saved = list_checkpoints(folders.checkpoints(stage))
    if saved:
        check_same(identity, load_checkpoint(saved[-1])["recipe"], saved[-1], folders.run)
    if not adapter.is_dir():
        return False
    info = read_info(adapter)
    check_same(identity, _read_identity(info.recipe, stage), adapter, folders.run)
    if info.step < steps and not saved:
        raise UserError(
            f"{adapter} was trained for {info.step} of {steps} steps and its checkpoints are gone:"
            f" give the recipe a new name, or delete {folders.run} to start over."
        )
    return info.step >= steps


def _read_identity(text: str, stage: Stage) -> dict[str, Any]:
    """The identity in an exported recipe; empty if this version cannot read it."""
    try:
        recipe = Recipe.model_validate(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError):
        return {}
    return select_identity(recipe.model_dump(mode="json"), stage)
