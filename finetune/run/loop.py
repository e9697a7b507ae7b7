"""The training loop: one for both stages."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from adapters.base.source import Source
from adapters.errors import UserError
from adapters.files.info import AdapterInfo
from finetune import __version__
from finetune.data.batches import Batches, derived_seed, prefetch
from finetune.data.pictures import Picture
from finetune.recipe.schema import Data, OutputPrior, Prior, Recipe, Training, Validation
from finetune.run.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from finetune.run.ending import export_run
from finetune.run.fixed_losses import FixedLosses, hold_out, select_evenly
from finetune.run.folders import FREE, Folders, select_identity, select_judging
from finetune.run.measures import Measures, Score, agree, was_patient
from finetune.run.tracking import Meter, Tracker
from finetune.run.trainee import Trainee
from finetune.run.update_size import UpdateSize
from finetune.run.validation import build_validator, enlarge
from finetune.step.optimizers import set_learning_rate
from finetune.step.schedules import SCHEDULES
from finetune.step.stages import STAGES, Stage
from unets.memory import forget_peak_memory, free_memory
from unets.precision import PRECISIONS

CARD_PROMPTS = 8
"""The number of captions listed with an adapter if the recipe has no validation prompts."""

SIZE_POINTS = 25
"""The most points of a run that measure the size of the update, which changes slowly."""


@dataclass(frozen=True)
class Material:
    """Everything that a run trains on: pictures, and the encodings of all their captions."""

    pictures: Sequence[Picture]
    class_pictures: Sequence[Picture]
    prompt_embeds: Mapping[str, Tensor]


def train_stage(
    recipe: Recipe,
    stage: Stage,
    material: Material,
    accelerator: Accelerator,
    score: Score | None = None,
) -> None:
    """Train one stage from its newest checkpoint, if any, and export its adapter.

    ``score`` computes the figures of validation's pictures; ``None``: they are not scored.
    """
    folders, device = Folders(recipe.folder), accelerator.device
    training, source = recipe.training(stage), recipe.source(stage)
    settings = recipe.validation
    seed = derived_seed(recipe.seed, stage.number)
    low_res_px = recipe.source(STAGES[1]).picture_size_px if stage.super_resolution else None
    free_memory(device)  # the previous stage's
    trainee = load_trainee(stage, training, source, seed, device)
    state: dict[str, Any] = {}
    if saved := list_checkpoints(folders.checkpoints(stage)):
        state = load_checkpoint(saved[-1])
        trainee.load_state(state)
    if training.compile:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((recipe.cache / "compiled").resolve()))
        trainee.compile()
    pictures, held_out = hold_out(material.pictures, settings.held_out, recipe.seed)
    material = replace(material, pictures=pictures)
    batches = build_batches(
        trainee, material, recipe.data, recipe.prior, low_res_px, seed, accelerator
    )
    tracker = Tracker(
        accelerator, folders.logs(stage), f"Stage {stage.number}", trainee.step, training.steps
    )
    tracker.text("recipe", recipe.to_yaml())
    precision = training.precision_on(device)
    if batches.preserves_output and precision not in PRECISIONS and accelerator.is_main_process:
        tracker.bar.write(
            f"{stage.name}: what prior.kind: output preserves is the predictions of the base in"
            f" {precision}, as it is trained, and not those of its full precision."
        )
    tree = recipe.model_dump(mode="json")
    judging, measures = select_judging(tree, stage), None
    if accelerator.is_main_process:
        enlarger = None
        if recipe.base.stage_2 and not stage.super_resolution:
            enlarger = partial(enlarge, recipe=recipe, embeds=material.prompt_embeds, device=device)
        measured = select_evenly(pictures, settings.loss_pictures)
        measures = Measures(
            trainee,
            tracker,
            settings,
            validator=build_validator(recipe, trainee, material.prompt_embeds, pictures),
            score=score,
            enlarge=enlarger,
            fixed=FixedLosses(batches, measured) if measured else None,
            held_out=FixedLosses(batches, held_out) if held_out else None,
            depends_on=judging,
            prior=recipe.prior.kind if recipe.prior else None,
        )
        if state:
            measures.load_state(state["measures"])
    stopped_early = bool(state.get("stopped_early")) and was_patient(
        state["measures"], settings, judging
    )
    if not stopped_early:
        stopped_early = run_steps(
            trainee,
            batches,
            tracker,
            measures,
            accelerator,
            log_every=recipe.log_every,
            validation=settings,
            checkpoints=folders.checkpoints(stage),
            identity=select_identity(tree, stage),
        )
    if measures is not None:
        trainee.watch.check()
        captions = dict.fromkeys(picture.caption for picture in material.pictures)
        info = AdapterInfo(
            base_model=source.name,
            base_revision=source.revision,
            stage=stage.number,
            spec=training.adapter,
            prompts=settings.prompts or tuple(captions)[:CARD_PROMPTS],
            step=trainee.step,
            stopped_early=stopped_early,
            recipe=recipe.to_yaml(),
            version=__version__,
        )
        columns = {"seed": recipe.seed, "prior": recipe.prior and recipe.prior.model_dump()}
        columns |= training.model_dump(mode="json", exclude={*FREE} - {"steps"})
        export_run(trainee, measures, tracker, folders.adapters, info, columns)
    tracker.close()
    accelerator.wait_for_everyone()


def run_steps(
    trainee: Trainee,
    batches: Batches,
    tracker: Tracker,
    measures: Measures | None,
    accelerator: Accelerator,
    *,
    log_every: int,
    validation: Validation,
    checkpoints: Path,
    identity: Mapping[str, Any],
) -> bool:
    """Take all remaining steps; log, validate and save on the way.

    Checkpoints hold the ``identity`` of the recipe, so that no other recipe continues from them.

    Returns:
        True if validation's patience ran out before the last step.
    """
    training, options, first = trainee.training, trainee.training.optimizer, trainee.step
    gradient = trainee.weights.gradient
    if measures and not measures.history:
        measures.begin()
    meter = Meter(
        batches.num_train_timesteps,
        accelerator.device,
        preserves_output=batches.preserves_output,
    )
    update_size = UpdateSize(trainee.unet)
    size_every = math.ceil(training.steps / log_every / SIZE_POINTS) * log_every
    forget_peak_memory(accelerator.device)
    indices = range(first * training.accumulation, training.steps * training.accumulation)
    feed = prefetch(batches, indices, accelerator.device)
    stopped = False
    for step in range(first, training.steps):
        factor = SCHEDULES[options.schedule](step, training.steps, options.warmup_steps)
        set_learning_rate(trainee.optimizer, factor)
        for _ in range(training.accumulation):
            batch = next(feed)
            losses = trainee.accumulate(batch)
            meter.add(losses, batch)
        if accelerator.num_processes > 1:
            gradient.copy_(accelerator.reduce(gradient, "mean"))
        meter.add_step(trainee.update())
        tracker.bar.update()

        done, last = trainee.step, trainee.step == training.steps
        if done % log_every == 0 or last:
            points = meter.read(accelerator, training.accumulation)
            check_loss(points["loss"], done)
            trainee.watch.check()
            if accelerator.is_main_process and (done % size_every == 0 or last):
                points |= {f"update/{block}": size for block, size in update_size().items()}
            points["optimizer/learning_rate"] = options.learning_rate * factor
            tracker.points(points, done)
        started = time.perf_counter()
        if done % validation.every == 0 or last:
            if measures:
                measures.validate()
            if validation.patience is not None and not last:
                stopped = agree(measures is not None and measures.stalled, accelerator)
        if measures and (done % training.checkpoint_every == 0 or last or stopped):
            state = trainee.state() | {"recipe": identity, "measures": measures.state()}
            state["stopped_early"] = stopped
            save_checkpoint(checkpoints, done, state, training.keep_checkpoints)
        meter.skip_time(time.perf_counter() - started)
        if stopped:
            break
    return stopped


def check_loss(loss: float, step: int) -> None:
    """Raise a UserError if training has diverged."""
    if not math.isfinite(loss):
        raise UserError(
            f"The loss is {loss} at step {step}: training has diverged; lower"
            " optimizer.learning_rate, or set optimizer.max_grad_norm, and delete the checkpoints"
            " of this run that are newer than the last finite loss."
        )


def load_trainee(
    stage: Stage, training: Training, source: Source, seed: int, device: torch.device
) -> Trainee:
    """Load a stage's UNet and schedulers and attach a fresh adapter."""
    unet = source.unet(training.precision_on(device), device)
    schedulers = tuple(source.scheduler(name) for name in stage.schedulers)
    return Trainee(stage, training, unet, schedulers, seed=seed)


def build_batches(
    trainee: Trainee,
    material: Material,
    data: Data,
    prior: Prior | None,
    low_res_px: int | None,
    seed: int,
    accelerator: Accelerator,
) -> Batches:
    """Build the batches on which this process trains a stage."""
    training, schedulers = trainee.training, trainee.schedulers
    levels = (0, schedulers[-1].config.num_train_timesteps - 1)
    captions = (picture.caption for picture in material.pictures)
    return Batches(
        data=data,
        pictures=material.pictures,
        class_pictures=material.class_pictures,
        prior=prior,
        prompt_embeds=material.prompt_embeds,
        batch_size=training.batch_size,
        size_px=trainee.unet.config.sample_size,
        low_res_px=low_res_px,
        noise_level=training.noise_level or levels,
        num_train_timesteps=schedulers[0].config.num_train_timesteps,
        seed=seed,
        timesteps=training.timesteps,
        accumulation=training.accumulation,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        prompts=prior.list_captions(captions) if isinstance(prior, OutputPrior) else (),
    )
