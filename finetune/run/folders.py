"""The folders of a run, and the settings that must stay the same for it to continue."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from adapters.checksums import SUMS
from adapters.errors import UserError, listed
from adapters.files.complete import find_export_damage
from adapters.files.info import read_info
from finetune.recipe.schema import Recipe
from finetune.recipe.yaml12 import read_yaml
from finetune.run.checkpoints import Found, find_newest
from finetune.run.identity import DIVISION, find_differences
from finetune.step.stages import Stage

SHARED = ("seed", "base", "data", "prior", "text")
"""The parts of a recipe that every stage depends on."""

FREE = ("steps", "checkpoint_every", "keep_checkpoints", "cuda_graph", "compile")
"""The settings of a stage that may change when its run continues."""

CHECKPOINT = (
    *("step", "parameters", "average", "optimizer", "gradients"),
    *("recipe", "measures", "stopped_early"),
)
"""The entries that every checkpoint of a stage has."""

BOUND = ("figure", "keep_others")
"""The settings of ``validation.best`` that decide which validation is the best."""

SCORED_BY = ("identifier", "subject", "clip")
"""The settings of ``evaluation`` that the figures of validation depend on."""


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


def select_judging(recipe: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """Select from a dumped recipe what validation's figures and the choice by them depend on.

    They may change for a stage to continue, but then its history of validations begins again.
    Patience is not among them, since it decides only when a run stops.
    """
    validation, names = recipe["validation"], ["prompts", "other_prompts", "seed", "loss_pictures"]
    settings: dict[str, Any] = {}
    if stage.super_resolution:  # what it enlarges is Stage I's
        names.append("stage_2_prompts")
        settings["stage_1.steps"] = (recipe["stage_1"] or {}).get("steps")
    settings |= {f"validation.{name}": validation[name] for name in names}
    for number in range(1, stage.number + 1):
        name = f"sampling.stage_{number}"
        settings[f"validation.{name}"] = validation["sampling"][f"stage_{number}"]
    best, evaluation = validation["best"] or {}, recipe["evaluation"] or {}
    settings |= {f"validation.best.{name}": best.get(name) for name in BOUND}
    return settings | {f"evaluation.{name}": evaluation.get(name) for name in SCORED_BY}


def find_changed(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that have another value than the saved ones."""
    return [name for name, value in settings.items() if saved.get(name) != value]


def check_same(
    identity: Mapping[str, Any], saved: Mapping[str, Any], place: Path, run: Path
) -> None:
    """Raise a UserError if the identity saved at a place in a run is another recipe's."""
    if changed := find_differences(identity, saved):
        raise UserError(
            f"{place} was made with another recipe ({listed(changed, 4)}): give the recipe a new"
            f" name, or delete {run} to start over."
        )


def leave_out_division(identity: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """Leave out of a recipe's identity what only divides the pictures of a step."""
    own = {name: value for name, value in identity[stage.name].items() if name not in DIVISION}
    return dict(identity) | {stage.name: own}


def _are_as_many(one: Mapping[str, Any], other: Mapping[str, Any], stage: Stage) -> bool:
    """Tell whether two recipes take as many pictures at a step in each process."""
    sizes = {prod(each[stage.name][name] for name in DIVISION) for each in (one, other)}
    return len(sizes) == 1


def find_checkpoint(stage: Stage, identity: Mapping[str, Any], folders: Folders) -> Found:
    """Find the newest whole checkpoint of a stage.

    Raises:
        UserError: if it is another recipe's, or as :func:`find_newest`.
    """
    found = find_newest(folders.checkpoints(stage), CHECKPOINT)
    if found.folder:
        saved = found.tree["recipe"]["settings"]
        check_same(
            leave_out_division(identity, stage),
            leave_out_division(saved, stage),
            found.folder,
            folders.run,
        )
    return found


def is_finished(
    stage: Stage,
    steps: int,
    identity: Mapping[str, Any],
    folders: Folders,
    *,
    patience: int | None,
    shared: bool = True,
) -> bool:
    """Tell whether a stage has been trained to its end and exported, and the export is whole.

    The end is the last step, or an earlier one where validation's patience ran out. A recipe with
    more ``patience`` than that, or with none at all (``None``), goes on from there. The files next
    to the stages' folders count if they are ``shared`` by this stage, the last one.

    Raises:
        UserError: if the exported adapter or the newest checkpoint is another recipe's, or if the
            checkpoints to continue or to export again from are gone.
    """
    adapter = folders.adapters / stage.name
    saved = find_checkpoint(stage, identity, folders).folder
    if not adapter.is_dir():
        return False
    if damage := find_export_damage(folders.adapters, stage.name, shared=shared):
        if saved:
            return False
        if damage.stage:
            raise UserError(
                f"{adapter} is not as it was exported ({damage.reason}), and there is no whole"
                " checkpoint to export it again from: restore it, give the recipe a new name, or"
                f" delete {folders.run} to start over."
            )
    info = read_info(adapter)
    exported = _read_recipe(info.recipe)
    saved_identity = select_identity(exported.model_dump(mode="json"), stage) if exported else {}
    last = info.last_step or info.step
    if saved and exported and (last < steps or _are_as_many(identity, saved_identity, stage)):
        # how a step is divided is for the checkpoint to say, which knows the number of processes
        identity, saved_identity = (
            leave_out_division(each, stage) for each in (identity, saved_identity)
        )
    check_same(identity, saved_identity, adapter, folders.run)
    had = exported.validation.patience if exported else None
    if info.stopped_early and patience is not None and had is not None and patience <= had:
        return True
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
    return [
        stage
        for stage in recipe.trained
        if not is_finished(
            stage,
            recipe.training(stage).steps,
            select_identity(tree, stage),
            folders,
            patience=recipe.validation.patience,
            shared=stage is recipe.trained[-1],
        )
    ]


def explain_ignored(recipe: Recipe, stage: Stage) -> list[str]:
    """Say which settings of a recipe would have changed a finished stage, and what it lacks.

    They are those that decide which validation is exported and when the run stops, and steps that
    are fewer than were trained.
    """
    folders, said = Folders(recipe.folder), []
    adapter = folders.adapters / stage.name
    info, steps = read_info(adapter), recipe.training(stage).steps
    shared = stage is recipe.trained[-1]
    damage = find_export_damage(folders.adapters, stage.name, shared=shared)
    if damage and not damage.stage and (folders.adapters / SUMS).exists():
        said.append(
            f"{folders.adapters} is not as it was exported ({damage.reason}), and there is no"
            " checkpoint to export it again from; the adapters themselves are whole."
        )
    if (last := info.last_step or info.step) > steps:
        said.append(
            f"{adapter} stays as it was exported, trained for {last} steps and not {steps}: to"
            f" train fewer, give the recipe a new name, or delete {folders.run} to start over."
        )
    exported = _read_recipe(info.recipe)
    if exported is None or not (recipe.validation.best or exported.validation.best):
        return said  # nothing was chosen by a validation, nor would be
    now, then = (
        {"validation.best.patience": each.validation.patience}
        | select_judging(each.model_dump(mode="json"), stage)
        for each in (recipe, exported)
    )
    if changed := find_changed(now, then):
        said.append(
            f"{adapter} stays as it was exported, with other settings ({', '.join(changed)}"
            f" differ): to train with the new ones, give the recipe a new name, or delete"
            f" {folders.run} to start over."
        )
    return said


def _read_recipe(text: str) -> Recipe | None:
    """Read an exported recipe; ``None``: this version cannot read it."""
    try:
        return Recipe.model_validate(read_yaml(text))
    except ValueError:  # which pydantic's is, too
        return None
