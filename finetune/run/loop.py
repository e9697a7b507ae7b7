"""The training loop: one for both stages."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from adapters.errors import UserError
from adapters.files.export import export_adapter
from adapters.files.info import AdapterInfo, read_info
from adapters.files.model_card import write_card
from adapters.files.places import stage_folders
from adapters.pictures.contact_sheet import contact_sheet
from finetune import __version__
from finetune.data.batches import Batches, derived_seed, prefetch
from finetune.data.pictures import Picture
from finetune.recipe.schema import Recipe
from finetune.run.checkpoints import save_checkpoint
from finetune.run.compiling import Compiling
from finetune.run.folders import Folders, identity, noise_levels, resume, timesteps_of
from finetune.run.tracking import Meter, Tracker
from finetune.run.trainee import Trainee
from finetune.run.update_size import UpdateSize
from finetune.run.validation import Validation, prepare_validation
from finetune.step.optimizers import SCHEDULES, set_learning_rate
from finetune.step.stages import STAGES, Stage
from unets.memory import forget_peak_memory, free_memory

CARD_PROMPTS = 8
"""How many captions an adapter names where the recipe has no validation prompts."""

SIZE_POINTS = 25
"""At most so many points of a run measure the size of the update, which changes slowly."""


@dataclass(frozen=True)
class Material:
    """What a run teaches: pictures, and the encodings of all its captions."""

    pictures: Sequence[Picture]
    class_pictures: Sequence[Picture]
    prompt_embeds: Mapping[str, Tensor]


def train_stage(recipe: Recipe, stage: Stage, material: Material, accelerator: Accelerator) -> None:
    """Teach one stage and export its adapter; continues from the newest checkpoint, if any."""
    folders = Folders(recipe.folder)
    training = recipe.training(stage)
    free_memory(accelerator.device)  # of the stage before
    trainee = load_trainee(recipe, stage, accelerator.device)
    resume(trainee, folders.checkpoints(stage))
    batches = batches_of(recipe, stage, trainee, material, accelerator)
    tracker = Tracker(
        accelerator, folders.logs(stage), f"Stage {stage.number}", trainee.step, training.steps
    )
    tracker.text("recipe", recipe.to_yaml())
    validate = None
    if accelerator.is_main_process:
        validate = prepare_validation(
            recipe,
            stage,
            trainee.unet,
            material.prompt_embeds,
            material.pictures,
            batches.low_res_px,
            folders.adapters,
        )
    run_steps(recipe, trainee, batches, tracker, validate, accelerator)
    if accelerator.is_main_process:
        trainee.watch.check()
        with trainee.final_weights() as unet:
            samples = show(validate, tracker, trainee.step)
            info = adapter_info(recipe, trainee, material)
            tracker.bar.write(export_adapter(unet, folders.adapters, info).message)
        infos = [read_info(folder) for folder in stage_folders(folders.adapters)]
        write_card(folders.adapters, infos, samples)
    tracker.close()
    accelerator.wait_for_everyone()


def run_steps(
    recipe: Recipe,
    trainee: Trainee,
    batches: Batches,
    tracker: Tracker,
    validate: Validation | None,
    accelerator: Accelerator,
) -> None:
    """Take every step that is left, reporting, validating and saving on the way."""
    training, first = trainee.training, trainee.step
    gradient = trainee.weights.gradient
    compiling = Compiling.of(recipe, trainee, accelerator.num_processes)
    meter = Meter(batches.num_train_timesteps, accelerator.device)
    update_size = UpdateSize(trainee.unet)
    size_every = math.ceil(training.steps / recipe.log_every / SIZE_POINTS) * recipe.log_every
    forget_peak_memory(accelerator.device)
    indices = range(first * training.accumulation, training.steps * training.accumulation)
    feed = prefetch(batches, indices, accelerator.device)
    for step in range(first, training.steps):
        options = training.optimizer
        factor = SCHEDULES[options.schedule](step, training.steps, options.warmup_steps)
        set_learning_rate(trainee.optimizer, factor)
        for _ in range(training.accumulation):
            batch = next(feed)
            losses = trainee.accumulate(batch)
            meter.add(losses, batch.weight, batch.timesteps)
        if accelerator.num_processes > 1:
            gradient.copy_(accelerator.reduce(gradient, "mean"))
        meter.add_step(trainee.update())
        tracker.bar.update()

        done, last = trainee.step, trainee.step == training.steps
        if done % recipe.log_every == 0 or last:
            points = meter.read(accelerator, training.accumulation)
            check_finite(points["loss"], done)
            trainee.watch.check()
            if accelerator.is_main_process and (done % size_every == 0 or last):
                points |= {f"update/{block}": size for block, size in update_size().items()}
            tracker.points(points | {"learning_rate": options.learning_rate * factor}, done)
            if reason := compiling.consider(points["pictures_per_second"]):
                tracker.bar.write(reason)
        started = time.perf_counter()
        if validate and done % recipe.validation.every == 0 and not last:
            with trainee.final_weights():
                show(validate, tracker, done)
        if accelerator.is_main_process and (done % training.checkpoint_every == 0 or last):
            save_checkpoint(
                Folders(recipe.folder).checkpoints(trainee.stage),
                done,
                trainee.state() | {"recipe": identity(recipe, trainee.stage)},
                training.keep_checkpoints,
            )
        meter.skip_time(time.perf_counter() - started)


def show(validate: Validation | None, tracker: Tracker, step: int) -> dict[str, Image.Image]:
    """Sample, show what was sampled, and return the first source's pictures by prompt."""
    samples = validate() if validate else {}
    for title, row in samples.items():
        prompts, pictures = zip(*row, strict=True)
        tracker.picture(title, contact_sheet([pictures], column_captions=prompts), step)
    return dict(next(iter(samples.values()), []))


def check_finite(loss: float, step: int) -> None:
    """Raise a UserError where training has diverged."""
    if not abs(loss) < float("inf"):
        raise UserError(
            f"The loss is {loss} at step {step}: training has diverged; lower"
            " optimizer.learning_rate, or set optimizer.max_grad_norm, and delete the checkpoints"
            " of this run that are newer than the last finite loss."
        )


def load_trainee(recipe: Recipe, stage: Stage, device: torch.device) -> Trainee:
    """Load a stage's UNet and schedulers and attach a fresh adapter."""
    training = recipe.training(stage)
    source = recipe.source(stage)
    unet = source.unet(training.precision_on(device), device)
    schedulers = tuple(source.scheduler(name) for name in stage.schedulers)
    return Trainee.of(
        stage, training, unet, schedulers, seed=derived_seed(recipe.seed, stage.number)
    )


def batches_of(
    recipe: Recipe, stage: Stage, trainee: Trainee, material: Material, accelerator: Accelerator
) -> Batches:
    """The batches of one stage on this process."""
    return Batches(
        data=recipe.data,
        pictures=material.pictures,
        class_pictures=material.class_pictures,
        prior=recipe.prior,
        prompt_embeds=material.prompt_embeds,
        batch_size=trainee.training.batch_size,
        size_px=trainee.unet.config.sample_size,
        low_res_px=recipe.source(STAGES[1]).picture_size_px if stage.super_resolution else None,
        noise_level=noise_levels(trainee.training, trainee.schedulers[-1]),
        num_train_timesteps=trainee.schedulers[0].config.num_train_timesteps,
        seed=derived_seed(recipe.seed, stage.number),
        timesteps=timesteps_of(trainee.training, stage, trainee.schedulers[0]),
        accumulation=trainee.training.accumulation,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def adapter_info(recipe: Recipe, trainee: Trainee, material: Material) -> AdapterInfo:
    """What an exported adapter says of itself."""
    captions = dict.fromkeys(picture.caption for picture in material.pictures)
    prompts = recipe.validation.prompts or tuple(captions)[:CARD_PROMPTS]
    base = recipe.source(trainee.stage)
    return AdapterInfo(
        base_model=base.name,
        base_revision=base.revision,
        stage=trainee.stage.number,
        spec=trainee.training.adapter,
        prompts=prompts,
        step=trainee.step,
        recipe=recipe.to_yaml(),
        version=__version__,
    )
