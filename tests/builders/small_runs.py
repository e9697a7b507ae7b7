"""Whole runs of a stage on a random cascade, in this process and within a second or so.

The default optimizer moves every weight that has a gradient by the learning rate at each step (Adam
without memory), so that a run's weights say what the learning rate was.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from adapters.files.places import PEFT_WEIGHTS
from adapters.weights.kinds import adapter_state
from finetune.data.batches import Batches, derived_seed
from finetune.data.pictures import Picture
from finetune.recipe.schema import Recipe
from finetune.run.checkpoints import list_checkpoints, load_checkpoint
from finetune.run.folders import Folders
from finetune.run.measures import Score
from finetune.run.stage_run import Material, build_batches, load_trainee, train_stage
from finetune.run.trainee import Trainee
from finetune.step.stages import STAGES
from tests.builders.random_cascade import TEXT_WIDTH, RandomCascade

CPU = torch.device("cpu")
SIGN_DESCENT = {"name": "adamw", "learning_rate": 1e-3, "betas": [0, 0], "weight_decay": 0}
PROMPTS = ("", "a sks dog", "a dog", "a cat")


def recipe_of(
    cascade: RandomCascade,
    folder: Path,
    *,
    stage: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    validation: dict[str, Any] | None = None,
    stages: tuple[int, ...] = (1,),
    **sections: Any,
) -> Recipe:
    """A recipe of four steps, each of which is logged and saved.

    Args:
        cascade: the base.
        folder: of runs and cache.
        stage: settings of the trained stages' sections.
        optimizer: settings of their optimizer, over :data:`SIGN_DESCENT`.
        validation: its own settings; none: nothing is measured.
        stages: which stages train.
        sections: of the recipe itself.
    """
    training = {
        "steps": 4,
        "batch_size": 2,
        "adapter": {"rank": 2},
        "optimizer": SIGN_DESCENT | (optimizer or {}),
        "checkpoint_every": 1,
        "keep_checkpoints": 100,
        **(stage or {}),
    }
    return Recipe.model_validate(
        {
            "name": "run",
            "base": {"stage_1": str(cascade.stage_1), "stage_2": str(cascade.stage_2)},
            "data": {"source": "unread", "prompt": "a sks dog"},
            "validation": validation or {"loss_pictures": 0},
            "log_every": 1,
            "runs_dir": str(folder / "runs"),
            "cache_dir": str(folder / "cache"),
            **{f"stage_{number}": training for number in stages},
            **sections,
        }
    )


def material_of(recipe: Recipe, count: int = 3) -> Material:
    """Random landscape pictures of 96 x 80 px, and random encodings of :data:`PROMPTS`."""
    folder = recipe.cache / "drawn"
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    embeds = {prompt: torch.randn(7, TEXT_WIDTH, generator=draw) for prompt in PROMPTS}
    pictures, classes = (
        [_picture(folder, caption, index) for index in range(count)]
        for caption in ("a sks dog", "a dog")
    )
    return Material(pictures, classes if recipe.class_pictures else [], embeds)


def _picture(folder: Path, caption: str, index: int) -> Picture:
    file = folder / f"{caption} {index}.npy"
    rng = np.random.default_rng([len(caption), index])
    np.save(file, rng.integers(0, 256, (80, 96, 3), dtype=np.uint8))
    return Picture(file, caption, file.name)


def train(recipe: Recipe, number: int = 1, score: Score | None = None) -> dict[str, Tensor]:
    """Train a stage; what it exports, by PEFT's names."""
    train_stage(recipe, STAGES[number], material_of(recipe), Accelerator(cpu=True), score)
    return exported(recipe, number)


def exported(recipe: Recipe, number: int = 1) -> dict[str, Tensor]:
    """The adapter that a run has exported, by PEFT's names."""
    place = Folders(recipe.folder).adapters / STAGES[number].name / PEFT_WEIGHTS
    tensors = load_file(place).items()
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All values in the order of PEFT's names, in float64."""
    named = {name.replace(".default", ""): tensor for name, tensor in tensors.items()}
    return torch.cat([named[name].double().flatten() for name in sorted(named)])


def trainee_of(recipe: Recipe, number: int = 1) -> Trainee:
    """The trainee that a run begins with."""
    stage = STAGES[number]
    seed = derived_seed(recipe.seed, number)
    return load_trainee(stage, recipe.training(stage), recipe.source(stage), seed, CPU)


def made_batches(recipe: Recipe, number: int = 1) -> Batches:
    """The batches of a run."""
    return batches_for(recipe, material_of(recipe), number)


def batches_for(recipe: Recipe, material: Material, number: int = 1) -> Batches:
    """The batches of a run on given material."""
    trainee = trainee_of(recipe, number)
    low_res_px = recipe.source(STAGES[1]).picture_size_px if number == 2 else None
    seed = derived_seed(recipe.seed, number)
    return build_batches(
        *(trainee, material, recipe.data, recipe.prior, low_res_px, seed), Accelerator(cpu=True)
    )


def saved_weights(recipe: Recipe, number: int = 1) -> Tensor:
    """The weights in training before the first step and after each, [steps + 1, values]."""
    saved = list_checkpoints(Folders(recipe.folder).checkpoints(STAGES[number]))
    trained = [flat(load_checkpoint(folder)["parameters"]) for folder in saved]
    return torch.stack([flat(adapter_state(trainee_of(recipe, number).unet)), *trained])


def events_of(recipe: Recipe, number: int = 1) -> EventAccumulator:
    """All that TensorBoard shows of a stage."""
    folder = Folders(recipe.folder).logs(STAGES[number])
    everything = {"images": 0, "scalars": 0, "tensors": 0}  # not a sample of each
    events = EventAccumulator(str(folder), size_guidance=everything)
    events.Reload()
    return events


def logged(recipe: Recipe, tag: str, number: int = 1) -> list[float]:
    """A curve in TensorBoard, point by point."""
    return [point.value for point in events_of(recipe, number).Scalars(tag)]
