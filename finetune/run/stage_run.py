"""One stage of a run: from its newest checkpoint, if any, to its exported adapter."""

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from adapters.base.source import Source
from adapters.files.info import AdapterInfo
from adapters.progress import format_seconds, say, timed
from finetune import __version__
from finetune.data.batches import Batches, derived_seed
from finetune.data.pictures import Picture
from finetune.recipe.schema import Data, OutputPrior, Prior, Recipe, Training
from finetune.run.checkpoints import Found, set_aside
from finetune.run.ending import export_run
from finetune.run.fixed_losses import FixedLosses, hold_out, select_evenly
from finetune.run.folders import (
    FREE,
    Folders,
    find_checkpoint,
    select_identity,
    select_judging,
)
from finetune.run.identity import (
    COMPUTING,
    PROCESSES,
    check_content,
    check_continuing,
    identify_content,
)
from finetune.run.loop import Loop
from finetune.run.measures import Measures, Score, was_patient
from finetune.run.other_trackers import OtherTrackers
from finetune.run.stopping import Stop
from finetune.run.tracking import Tracker, flatten
from finetune.run.trainee import Trainee
from finetune.run.validation import build_validator, enlarge
from finetune.step.stages import STAGES, Stage
from unets.memory import free_memory
from unets.precision import PRECISIONS

CARD_PROMPTS = 8
"""The number of captions listed with an adapter if the recipe has no validation prompts."""


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
    stop: Stop | None = None,
    *,
    force: bool = False,
) -> None:
    """Train one stage from its newest checkpoint, if any, and export its adapter.

    Args:
        recipe: the run's.
        stage: the stage.
        material: what it is trained on.
        accelerator: the processes that train it.
        score: computes the figures of validation's pictures; ``None``: they are not scored.
        stop: asks the run to stop; ``None``: nothing does.
        force: continue under a schedule for another number of steps.

    Raises:
        StoppedError: if ``stop`` asks for it, once all that is done is saved.
        UserError: as :func:`finetune.run.identity.check_continuing`.
    """
    free_memory(accelerator.device)  # the previous stage's
    content = identify_content(
        recipe,
        stage,
        material.pictures,
        material.class_pictures,
        accelerator.device,
        accelerator.num_processes,
    )
    trainee, saved = begin_or_continue(recipe, stage, content, accelerator, force=force)
    taught, held_out = hold_out(material.pictures, recipe.validation.held_out, recipe.seed)
    material = replace(material, pictures=taught)
    low_res_px = recipe.source(STAGES[1]).picture_size_px if stage.super_resolution else None
    seed = derived_seed(recipe.seed, stage.number)
    batches = build_batches(
        trainee, material, recipe.data, recipe.prior, low_res_px, seed, accelerator
    )
    folders, steps = Folders(recipe.folder), trainee.training.steps
    logs, title = folders.logs(stage), f"Stage {stage.number}"
    tracker = Tracker(accelerator, logs, title, trainee.step, steps)
    with closing(tracker):  # on errors too, or their sentence would follow the bar in its line
        tracker.about({"recipe": recipe.to_yaml()})
        tree, measures = recipe.model_dump(mode="json"), None
        judging, identity = select_judging(tree, stage), select_identity(tree, stage)
        if accelerator.is_main_process:
            tracker.others = OtherTrackers.of(recipe, stage.name, logs, flatten(tree))
            say_what_is_preserved(trainee, batches, tracker)
            measures = build_measures(
                recipe, trainee, batches, tracker, material.prompt_embeds, held_out, score, judging
            )
            if saved:
                measures.load_state(saved["measures"])
        stopped_early = bool(saved.get("stopped_early")) and was_patient(
            saved["measures"], recipe.validation, judging
        )
        if not stopped_early:
            loop = Loop(
                trainee,
                batches,
                tracker,
                measures,
                accelerator,
                log_every=recipe.log_every,
                validation=recipe.validation,
                checkpoints=folders.checkpoints(stage),
                identity={"settings": identity, "content": content, "steps": steps},
                stop=stop or Stop(),
            )
            stopped_early = loop.run()
        if measures is not None:
            info = describe_adapter(recipe, trainee, taught, stopped_early=stopped_early)
            export(recipe, trainee, measures, tracker, info)
    accelerator.wait_for_everyone()


def begin_or_continue(
    recipe: Recipe,
    stage: Stage,
    content: Mapping[str, Any],
    accelerator: Accelerator,
    *,
    force: bool,
) -> tuple[Trainee, dict[str, Any]]:
    """Load a stage's trainee at its newest checkpoint, or before its first step.

    Returns:
        The trainee, and the tree of the checkpoint: empty without one.

    Raises:
        UserError: as :func:`finetune.run.identity.check_continuing`.
    """
    folders = Folders(recipe.folder)
    settings = select_identity(recipe.model_dump(mode="json"), stage)
    found = find_checkpoint(stage, settings, folders)
    for note in check_continuing(recipe, stage, found, content, force=force):
        accelerator.print(f"warning: {note}")
    with timed(f"Stage {stage.number}, loading", shown=accelerator.is_main_process):
        trainee = continue_training(recipe, stage, found, accelerator.device)
    if trainee.step:
        accelerator.print(
            f"Stage {stage.number} goes on after step {trainee.step:,} of"
            f" {trainee.training.steps:,}, from {folders.checkpoints(stage)}"
        )
    accelerator.wait_for_everyone()  # all have read what is renamed now
    if accelerator.is_main_process:
        set_aside(found)
    return trainee, found.tree


def export(
    recipe: Recipe, trainee: Trainee, measures: Measures, tracker: Tracker, info: AdapterInfo
) -> None:
    """Export a trained stage's adapter, and say how long its steps and validations took."""
    trainee.watch.check()
    say(f"Stage {info.stage}, {describe_times(tracker)}")
    columns = {"seed": recipe.seed, "prior": recipe.prior and recipe.prior.model_dump()}
    columns |= trainee.training.model_dump(mode="json", exclude={*FREE} - {"steps"})
    # together, once the export is complete, or a second one would repeat them
    with timed(f"Stage {info.stage}, export"), tracker.together():
        export_run(trainee, measures, tracker, Folders(recipe.folder).adapters, info, columns)


def describe_times(tracker: Tracker) -> str:
    """Describe the time that a stage's steps took, and that of the validations between them."""
    steps, validation = tracker.pace.seconds, tracker.pace.skipped_s
    return f"training: {format_seconds(steps)}, and validation: {format_seconds(validation)}"


def check_before(
    recipe: Recipe,
    stage: Stage,
    pictures: Sequence[Picture],
    accelerator: Accelerator,
    *,
    force: bool = False,
) -> None:
    """Check a stage's newest checkpoint, if any, as far as that needs no encoded captions.

    Raises:
        UserError: as :func:`finetune.run.identity.check_continuing`.
    """
    settings = select_identity(recipe.model_dump(mode="json"), stage)
    found = find_checkpoint(stage, settings, Folders(recipe.folder))
    if found.folder:
        content = identify_content(
            recipe, stage, pictures, None, accelerator.device, accelerator.num_processes
        )
        check_continuing(recipe, stage, found, content, force=force)


def check_finished(recipe: Recipe, pictures: Sequence[Picture], device: torch.device) -> None:
    """Check that finished stages were trained on what the recipe says now, if a checkpoint tells.

    How a step was divided and in which precision it was computed may differ, as nothing is trained.

    Raises:
        UserError: as :func:`finetune.run.identity.check_content`.
    """
    for stage in recipe.trained:
        settings = select_identity(recipe.model_dump(mode="json"), stage)
        found = find_checkpoint(stage, settings, Folders(recipe.folder))
        if found.folder:
            saved = found.tree["recipe"]["content"]
            now = identify_content(recipe, stage, pictures, None, device, saved[PROCESSES])
            now |= {key: saved[key] for key in COMPUTING if key in saved}
            check_content(now, saved, found.folder, recipe.folder, stage.name)


def continue_training(recipe: Recipe, stage: Stage, found: Found, device: torch.device) -> Trainee:
    """Load a stage's trainee, at its newest checkpoint if one was found."""
    training, seed = recipe.training(stage), derived_seed(recipe.seed, stage.number)
    trainee = load_trainee(stage, training, recipe.source(stage), seed, device)
    if found.folder:
        trainee.load_state(found.tree)
    if training.compile:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((recipe.cache / "compiled").resolve()))
        trainee.compile()
    return trainee


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


def build_measures(
    recipe: Recipe,
    trainee: Trainee,
    batches: Batches,
    tracker: Tracker,
    prompt_embeds: Mapping[str, Tensor],
    held_out: Sequence[Picture],
    score: Score | None,
    judging: Mapping[str, Any],
) -> Measures:
    """Build all that a stage's validations measure and show, with nothing measured yet."""
    settings, stage, device = recipe.validation, trainee.stage, trainee.unet.device
    enlarger = None
    if recipe.base.stage_2 and not stage.super_resolution:
        enlarger = partial(enlarge, recipe=recipe, embeds=prompt_embeds, device=device)
    measured = select_evenly(batches.pictures, settings.loss_pictures)
    return Measures(
        trainee,
        tracker,
        settings,
        validator=build_validator(recipe, trainee, prompt_embeds, batches.pictures),
        score=score,
        enlarge=enlarger,
        fixed=FixedLosses(batches, measured) if measured else None,
        held_out=FixedLosses(batches, held_out) if held_out else None,
        depends_on=judging,
        prior=recipe.prior.kind if recipe.prior else None,
    )


def say_what_is_preserved(trainee: Trainee, batches: Batches, tracker: Tracker) -> None:
    """Say that a quantised base's own predictions are preserved, if its output is."""
    precision = trainee.training.precision_on(trainee.unet.device)
    if batches.preserves_output and precision not in PRECISIONS:
        tracker.bar.write(
            f"{trainee.stage.name}: what prior.kind: output preserves is the predictions of the"
            f" base in {precision}, as it is trained, and not those of its full precision."
        )


def describe_adapter(
    recipe: Recipe, trainee: Trainee, taught: Sequence[Picture], *, stopped_early: bool
) -> AdapterInfo:
    """Describe the adapter of a stage's last step, with the prompts to show beside it."""
    source = recipe.source(trainee.stage)
    captions = dict.fromkeys(picture.caption for picture in taught)
    return AdapterInfo(
        base_model=source.name,
        base_revision=source.revision,
        stage=trainee.stage.number,
        spec=trainee.training.adapter,
        prompts=recipe.validation.prompts or tuple(captions)[:CARD_PROMPTS],
        step=trainee.step,
        stopped_early=stopped_early,
        sampling=recipe.validation.sampling.model_dump(exclude={"batch_size"}),
        recipe=recipe.to_yaml(),
        version=__version__,
    )
