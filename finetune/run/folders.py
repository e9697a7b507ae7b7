"""The folders of a run, and the settings that must stay the same for it to continue."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from adapters.errors import UserError
from adapters.files.info import read_info
from finetune.recipe.schema import Recipe
from finetune.run.checkpoints import list_checkpoints, load_checkpoint
from finetune.step.stages import Stage

SHARED = ("seed", "base", "data", "prior", "text")
"""The parts of a recipe that every stage depends on."""

FREE = ("steps", "checkpoint_every", "keep_checkpoints", "cuda_graph", "compile")
"""The settings of a stage that may change when its run continues."""


@dataclass(frozen=True)
class Folders:
    """The folders that a run writes."""

    run: Path

    @property
    def adapters(self) -> Path:
        """The folder of the exported adapters, which the user keeps."""
        return self.run / "adapters"

    @property
    def evaluation(self) -> Path:
        """The folder of the newest evaluation: its report, scores and pictures."""
        return self.run / "evaluation"

    def checkpoints(self, stage: Stage) -> Path:
        """Return the folder of a stage's checkpoints."""
        return self.run / "checkpoints" / stage.name

    def logs(self, stage: Stage) -> Path:
        """Return the folder of a stage's TensorBoard events."""
        return self.run / "logs" / stage.name


def select_identity(recipe: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """Select from a dumped recipe the settings that must not change for a stage to continue."""
    section = recipe[stage.name] or {}
    own = {name: value for name, value in section.items() if name not in FREE}
    held_out = recipe["validation"]["held_out"]  # decides which pictures are trained on
    shared = {name: recipe[name] for name in SHARED} | {"validation.held_out": held_out or None}
    return shared | {stage.name: own}


def check_same(
    identity: Mapping[str, Any], saved: Mapping[str, Any], place: Path, run: Path
) -> None:
    """Raise a UserError if the identity saved at a place in a run is another recipe's."""
    changed = [key for key, value in identity.items() if saved.get(key) != value]
    if changed:
        raise UserError(
            f"{place} was made with another recipe ({', '.join(changed)} differ): give the recipe"
            f" a new name, or delete {run} to start over."
        )


def is_finished(
    stage: Stage, steps: int, identity: Mapping[str, Any], folders: Folders, *, patient: bool
) -> bool:
    """Tell whether a stage has been trained to its end and exported.

    The end is the last step or, if the recipe is ``patient`` no longer than some validations
    without a better one, an earlier one.

    Raises:
        UserError: if the exported adapter or the newest checkpoint is another recipe's, or if the
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
    if info.stopped_early and patient:
        return True
    last = info.last_step or info.step
    if last < steps and not saved:
        raise UserError(
            f"{adapter} was trained for {last} of {steps} steps and its checkpoints are gone:"
            f" give the recipe a new name, or delete {folders.run} to start over."
        )
    return last >= steps


def list_unfinished(recipe: Recipe) -> list[Stage]:
    """List the stages of a recipe that are not trained to their end and exported, in order.

    Raises:
        UserError: as :func:`is_finished`.
    """
    folders, tree = Folders(recipe.folder), recipe.model_dump(mode="json")
    patient = recipe.validation.patience is not None
    return [
        stage
        for stage in recipe.trained
        if not is_finished(
            stage,
            recipe.training(stage).steps,
            select_identity(tree, stage),
            folders,
            patient=patient,
        )
    ]


def _read_identity(text: str, stage: Stage) -> dict[str, Any]:
    """Read the identity from an exported recipe; empty if this version cannot read the recipe."""
    try:
        recipe = Recipe.model_validate(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError):
        return {}
    return select_identity(recipe.model_dump(mode="json"), stage)
