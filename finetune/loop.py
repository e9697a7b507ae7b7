"""The training loop: one for both stages."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from adapters.card import write_card
from adapters.errors import UserError
from adapters.export import export_adapter
from adapters.info import AdapterInfo, read_info, stage_folders
from adapters.sheet import contact_sheet
from finetune import __version__
from finetune.batches import MODEL, Batches, derived_seed, prefetch
from finetune.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from finetune.data import Picture
from finetune.optimizers import learning_rate_factor, set_learning_rate
from finetune.recipe import Recipe
from finetune.stages import STAGES, Stage
from finetune.tracking import Meter, Tracker
from finetune.trainee import Trainee
from finetune.validation import Samples, Validation, prepare_validation

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Material:
    """What a run teaches: pictures, and the encodings of all its captions."""

    pictures: Sequence[Picture]
    class_pictures: Sequence[Picture]
    prompt_embeds: Mapping[str, Tensor]


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


def train_stage(recipe: Recipe, stage: Stage, material: Material, accelerator: Accelerator) -> None:
    """Teach one stage and export its adapter; continues from the newest checkpoint, if any."""
    folders = Folders(recipe.folder)
    training = recipe.training(stage)
    trainee = load_trainee(recipe, stage, accelerator.device)
    resume(trainee, recipe, folders.checkpoints(stage))
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
    samples = run_steps(recipe, trainee, batches, tracker, validate, accelerator)
    if accelerator.is_main_process:
        with trainee.final_weights() as unet:
            export_adapter(unet, folders.adapters, adapter_info(recipe, trainee, material))
        infos = [read_info(folder) for folder in stage_folders(folders.adapters)]
        write_card(folders.adapters, infos, dict(samples))
    tracker.close()
    accelerator.wait_for_everyone()


def run_steps(
    recipe: Recipe,
    trainee: Trainee,
    batches: Batches,
    tracker: Tracker,
    validate: Validation | None,
    accelerator: Accelerator,
) -> Samples:
    """Take every step that is left, reporting, validating and saving on the way.

    Returns:
        The last validation's samples.
    """
    samples: dict[str, Samples] = {}
    training, first = trainee.training, trainee.step
    meter = Meter(batches.num_train_timesteps, accelerator.device)
    indices = range(first * training.accumulation, training.steps * training.accumulation)
    feed = prefetch(batches, indices, accelerator.device)
    for step in range(first, training.steps):
        torch.manual_seed(derived_seed(recipe.seed, MODEL, accelerator.process_index, step))
        options = training.optimizer
        factor = learning_rate_factor(options.schedule, step, training.steps, options.warmup_steps)
        set_learning_rate(trainee.optimizer, factor)
        for _ in range(training.accumulation):
            batch = next(feed)
            losses = trainee.accumulate(batch)
            meter.add(losses, batch.weight, batch.timesteps)
        if accelerator.num_processes > 1:
            trainee.gradient.copy_(accelerator.reduce(trainee.gradient, "mean"))
        meter.add_step(trainee.update())
        tracker.bar.update()

        done, last = trainee.step, trainee.step == training.steps
        if done % recipe.log_every == 0 or last:
            points = meter.read(accelerator, training.accumulation)
            check_finite(points["loss"], done)
            tracker.points(points | {"learning_rate": options.learning_rate * factor}, done)
        started = time.perf_counter()
        if validate and (done % recipe.validation.every == 0 or last):
            with trainee.final_weights():
                samples = validate()
            for title, row in samples.items():
                prompts, pictures = zip(*row, strict=True)
                sheet = contact_sheet([pictures], column_captions=prompts)
                tracker.picture(title, sheet, done)
        if accelerator.is_main_process and (done % training.checkpoint_every == 0 or last):
            save_checkpoint(
                Folders(recipe.folder).checkpoints(trainee.stage),
                done,
                trainee.state() | {"recipe": identity(recipe, trainee.stage)},
                training.keep_checkpoints,
            )
        meter.skip_time(time.perf_counter() - started)
    return next(iter(samples.values()), [])


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
    automatic = "bf16" if device.type == "cuda" else "fp32"
    precision = automatic if training.precision == "auto" else training.precision
    source = recipe.source(stage)
    unet = source.component(UNet2DConditionModel, PRECISIONS[precision]).to(device)
    schedulers = tuple(
        DDPMScheduler.from_pretrained(source.name, subfolder=name, revision=source.revision)
        for name in stage.schedulers
    )
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
        noise_level=trainee.training.noise_level,
        num_train_timesteps=trainee.schedulers[0].config.num_train_timesteps,
        seed=derived_seed(recipe.seed, stage.number),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def identity(recipe: Recipe, stage: Stage) -> dict[str, object]:
    """What must not change between a checkpoint and the run that continues from it."""
    free = {"steps", "checkpoint_every", "keep_checkpoints"}
    return {
        "seed": recipe.seed,
        "base": recipe.base_of(stage),
        "data": recipe.data.model_dump(mode="json"),
        "prior": recipe.prior.model_dump(mode="json") if recipe.prior else None,
        stage.name: recipe.training(stage).model_dump(mode="json", exclude=free),
    }


def resume(trainee: Trainee, recipe: Recipe, root: Path) -> None:
    """Continue from the newest checkpoint below ``root``, if there is one.

    Raises:
        UserError: where that checkpoint is of another recipe.
    """
    saved = checkpoints(root)
    if not saved:
        return
    _, folder = saved[-1]
    state = load_checkpoint(folder)
    expected = identity(recipe, trainee.stage)
    changed = [key for key, value in expected.items() if state["recipe"].get(key) != value]
    if changed:
        raise UserError(
            f"The checkpoint {folder} was made with another recipe ({', '.join(changed)} differ):"
            " give the recipe a new name, or delete that folder to start over."
        )
    trainee.load_state(state)


def finished(recipe: Recipe, stage: Stage) -> bool:
    """Whether a stage has been trained to its last step and exported."""
    folders = Folders(recipe.folder)
    saved = checkpoints(folders.checkpoints(stage))
    exported = (folders.adapters / stage.name).is_dir()
    return bool(exported and saved and saved[-1][0] >= recipe.training(stage).steps)


def adapter_info(recipe: Recipe, trainee: Trainee, material: Material) -> AdapterInfo:
    """What an exported adapter says of itself."""
    prompts = recipe.validation.prompts or tuple(p.caption for p in material.pictures)
    return AdapterInfo(
        base_model=recipe.base_of(trainee.stage),
        base_revision=recipe.base.revision,
        stage=trainee.stage.number,
        spec=trainee.training.adapter,
        prompts=tuple(dict.fromkeys(prompts)),
        step=trainee.step,
        recipe=recipe.to_yaml(),
        version=__version__,
    )
