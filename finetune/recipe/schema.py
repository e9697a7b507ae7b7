"""Recipes: one YAML file describes a whole run and is checked before anything is loaded.

Every section is a pydantic model: its fields, with their types and ranges, are the schema, and the
text under each field is its documentation.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapters.cascade.sampling import Sampling
from adapters.errors import name_in
from adapters.weights.kinds import AdapterSpec
from finetune.recipe.consistency import (
    JUDGED,
    Drawing,
    find_absent_subject,
    find_mistakes,
    find_shared_pictures,
)
from finetune.recipe.prompt_lists import NAMES_IN, SUBJECT, put_in, read_prompts
from finetune.recipe.yaml12 import Dumper
from finetune.step.optimizers import OPTIMIZERS
from finetune.step.schedules import SCHEDULES
from finetune.step.stages import STAGES, Stage
from finetune.step.timesteps import DENSITIES
from unets.precision import Precision, automatic_precision

if TYPE_CHECKING:  # so that mistakes are reported without these slow imports
    import torch

    from adapters.base.source import Source

LARGEST_SHAPE = 1e6
"""The largest parameter of a density; beyond it all timesteps are the same, or arithmetic fails."""

SEEDS_APART = 1000
"""The distance between the seeds of two pictures of one prompt, more than there are prompts."""

LONG, SHOWN = 10, 3
"""The number of items above which a list is long, and of those that are shown of it."""

LEAST_SCALE = 0.1
"""The least sensible learning rate of an optimizer that finds its own step size."""


def _check_ascending(levels: tuple[int, int]) -> tuple[int, int]:
    if levels[0] > levels[1]:
        raise ValueError(f"must be [low, high] with low <= high (got {list(levels)})")
    return levels


def _check_one_for_each(prompts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    others = info.data.get("prompts", prompts)  # absent if they have a mistake themselves
    if len(prompts) != len(others):
        raise ValueError(f"must be one for each of the {len(others)} prompts (got {len(prompts)})")
    return prompts


def _read_list(prompts: Any) -> Any:
    """Read a list of prompts by name; pydantic reports what is none."""
    return list(read_prompts(prompts)) if isinstance(prompts, str) else prompts


def _read_own_list(prompts: Any) -> Any:
    """Read a user's own list of prompts, and leave the names of shipped ones as they are."""
    own = isinstance(prompts, str) and prompts.endswith(".txt")
    return list(read_prompts(prompts)) if own else prompts


Words = Annotated[str, Field(min_length=1, pattern=r"\S")]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Levels = Annotated[
    tuple[NonNegative, NonNegative], Field(strict=False), AfterValidator(_check_ascending)
]
Prompts = Annotated[tuple[str, ...], Field(strict=False)]
StagePrompts = Annotated[Prompts, AfterValidator(_check_one_for_each)]
NamedPrompts = Annotated[Prompts, BeforeValidator(_read_list)]
ChosenPrecision = Literal["auto", "fp32", "bf16", "int8", "nf4"]
Place = tuple[int | str, ...]


def _resolve(precision: ChosenPrecision, device: "torch.device") -> Precision:
    return automatic_precision(device) if precision == "auto" else precision


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about names and types."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class Base(Section):
    """The cascade to fine-tune: folders or hub names (``owner/name@revision``) for diffusers."""

    stage_1: str
    """Stage I; the whole cascade uses its text encoder and tokenizer."""
    stage_2: str | None = None
    """Stage II; needed to train it, and used for validation pictures if given."""
    stage_3: str | None = None
    """The x4 upscaler, for pictures only."""
    revision: str | None = None
    """The hub revision of Stages I and II if their names have none; ``None``: the newest."""
    variant: str | None = None
    """The weights' variant, such as ``fp16``, for components with it; ``None``: plain files."""

    def source(self, stage: Stage) -> "Source":
        """Return the source of a stage's model."""
        from adapters.base.source import Source

        name = {1: self.stage_1, 2: self.stage_2}[stage.number]
        assert name is not None
        return Source(name, stage.number, self.revision, self.variant)


class Data(Section):
    """The pictures and captions to train on, and the cropping of the pictures."""

    source: str
    """A folder of pictures (with ``metadata.jsonl`` or ``.txt`` captions, or none), or anything
    that ``datasets.load_dataset`` takes: a hub name or a local path."""
    config: str | None = None
    """The dataset's configuration, for datasets that have several; ``None``: its default."""
    revision: str | None = None
    """The dataset's hub revision; ``None``: the newest."""
    prompt: Annotated[str, Field(min_length=1)] | None = None
    """One caption for all pictures, in which ``{}`` is ``evaluation.identifier``; ``None``: each
    picture has its own."""
    split: str = "train"
    """The split of the dataset."""
    image_column: str = "image"
    """The column that holds the pictures."""
    caption_column: str = "text"
    """The column that holds the captions; not read if ``prompt`` is given."""
    center_shift: Fraction = 0.1
    """The largest shift of the square crop's centre, as a fraction of the crop's side."""
    horizontal_flip: bool = False
    """Mirror half of the pictures, at random."""
    caption_dropout: Fraction = 0.1
    """The share of captions replaced by the empty one, from which guidance leads away."""


class Preservation(Section):
    """The settings that both kinds of prior preservation have."""

    kind: str
    """The kind: ``pictures`` or ``output``."""
    share: Share
    """The share of preserved pictures in each optimizer step, over all processes and accumulated
    batches: at least one picture, never all."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """The weight of the preserved pictures' mean loss, relative to the subject's."""
    caption_dropout: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The share of preserved pictures captioned with the empty caption, whatever
    ``data.caption_dropout`` is. It is above zero so that the empty caption, from which guidance
    leads away, is preserved too."""

    def count_in(self, global_size: int) -> int:
        """Return the number of preserved pictures among those of an optimizer step."""
        return min(max(round(global_size * self.share), 1), global_size - 1)


class PicturePrior(Preservation):
    """Prior preservation by pictures of the subject's class, which are trained on beside it."""

    kind: Literal["pictures"] = "pictures"
    """``pictures``; this kind if the field is left out."""
    prompts: Annotated[Prompts, Field(min_length=1)]
    """Prompts of the class pictures, used in rotation, and their captions; ``{}`` is
    ``evaluation.subject``."""
    count: Positive = 100
    """The number of class pictures."""
    folder: str | None = None
    """A folder of class pictures to use instead of sampling them from the base cascade."""
    share: Share = 0.5
    """The share of class pictures in each optimizer step, as in either kind."""
    sampling: Sampling = Sampling()
    """Steps, guidance and noise level for the class pictures, by stage."""


class OutputPrior(Preservation):
    """Prior preservation by the base's own predictions, which need no class pictures.

    The pictures are the training data's with other captions, and the target is what the base
    predicts for them without the adapter, so that each of these captions goes on meaning the same.
    """

    kind: Literal["output"]
    """``output``."""
    prompts: Annotated[
        Annotated[Prompts, Field(min_length=1)] | Literal["everyday", "data"],
        BeforeValidator(_read_own_list),
    ]
    """The captions to preserve, in random order: a list, in which ``{}`` is
    ``evaluation.subject``; the name of a ``.txt`` file with a caption
    on each line; ``everyday``, for the captions of everyday things in
    ``finetune/recipe/prompts/everyday.txt``; or ``data``, for the training data's own, which holds
    back what is learnt of them."""
    share: Share = 0.25
    """The share of preserved pictures in each optimizer step, as in either kind."""

    def list_captions(self, of_data: Iterable[str] = ()) -> tuple[str, ...]:
        """List the distinct captions to preserve, given those of the training data."""
        if self.prompts == "data":
            return tuple(dict.fromkeys(of_data))
        return read_prompts(self.prompts) if isinstance(self.prompts, str) else self.prompts


def _prior_kind(prior: Any) -> str:
    """Return the kind of a section of prior preservation; ``pictures`` if it does not say."""
    if isinstance(prior, PicturePrior | OutputPrior):
        return prior.kind
    return str(prior.get("kind", "pictures")) if isinstance(prior, dict) else "pictures"


Prior = Annotated[
    Annotated[PicturePrior, Tag("pictures")] | Annotated[OutputPrior, Tag("output")],
    Discriminator(_prior_kind),
]
"""Either kind of prior preservation, told apart by ``kind``."""


class Text(Section):
    """The text encoder: its precision, its device, and the cleaning of its captions."""

    precision: ChosenPrecision = "auto"
    """The precision of the text encoder's weights; ``auto``: bf16 on a GPU, fp32 on a CPU."""
    device: Literal["auto", "cpu"] = "auto"
    """The device that encodes captions; ``auto``: the training device."""
    clean_caption: bool = True
    """Clean captions as IF's pipelines do by default. This removes HTML, links and odd
    punctuation, but also words such as ``<sks>``, ``j0hn``, ``#3``, ``@mydog``, and all Chinese."""

    def precision_on(self, device: "torch.device") -> Precision:
        """Return the precision of the text encoder on the device that encodes."""
        return _resolve(self.precision, device)


class Optimizer(Section):
    """The optimizer of the adapter's parameters."""

    name: Annotated[str, name_in(OPTIMIZERS)] = "adamw_8bit"
    """One of the names in ``finetune.step.optimizers.OPTIMIZERS``."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """The peak learning rate; 1 for ``prodigy``, which finds its own scale."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] | None = None
    """Decay rates of the first and second moments; ``None``: the optimizer's own."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    lora_plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+: the ratio of the B matrices' learning rate to the A matrices'."""
    schedule: Annotated[str, name_in(SCHEDULES)] = "constant"
    """One of the names in ``finetune.step.schedules.SCHEDULES``."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises from zero, fewer than the stage's ``steps``;
    ``one_cycle`` rises from 1/25 of the peak, and over 0.3 of the steps if this is 0."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the gradient to this norm; ``None``: never."""

    @field_validator("learning_rate", "betas", "lora_plus_ratio")
    @classmethod
    def _check_optimizer_takes(cls, value: Any, info: ValidationInfo) -> Any:
        name, field = info.data.get("name"), info.field_name
        if name is None:  # the name's own mistake is reported
            return value
        algorithm = OPTIMIZERS[name]
        if field == "betas" and value is not None and algorithm.betas is None:
            raise ValueError(f"{name} has no betas: leave them out")
        if algorithm.finds_scale and field == "learning_rate" and value < LEAST_SCALE:
            raise ValueError(
                f"{name} finds its own step size, which the learning rate multiplies: give 1, or"
                f" at least {LEAST_SCALE} (got {value})"
            )
        if algorithm.finds_scale and field == "lora_plus_ratio" and value != 1:
            raise ValueError(
                f"{name} takes one learning rate for all parameters: leave the ratio at 1"
                f" (got {value})"
            )
        return value


class Timesteps(Section):
    """The distribution of the timesteps that a stage is trained at; 0 has the least noise."""

    low: NonNegative = 0
    """The lowest timestep drawn."""
    high: NonNegative | None = None
    """The highest timestep drawn; ``None``: the last of the base's schedule."""
    density: Annotated[str, name_in(DENSITIES)] = "uniform"
    """The density from low to high: one of the names in ``finetune.step.timesteps.DENSITIES``."""
    shape: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """The parameters of ``beta``, [a, b], or of ``logit_normal``, [mean, std]. With ``beta``,
    [1, 2] favours low timesteps (detail), [2, 1] high ones (composition) and [2, 2] those between.
    ``None``: for ``uniform``, which has no parameters."""

    @field_validator("high")
    @classmethod
    def _check_not_below(cls, high: int | None, info: ValidationInfo) -> int | None:
        low = info.data.get("low", 0)
        if high is not None and high < low:
            raise ValueError(f"must be at least low, {low} (got {high})")
        return high

    @field_validator("shape")
    @classmethod
    def _check_shape(
        cls, shape: tuple[float, float] | None, info: ValidationInfo
    ) -> tuple[float, float] | None:
        if (name := info.data.get("density")) is None:  # its own mistake is reported
            return shape
        parameters, values = DENSITIES[name].parameters, shape or ()
        if len(values) != len(parameters):
            expected = f"[{', '.join(parameters)}]" if parameters else "left out"
            raise ValueError(f"must be {expected} with {name} (got {list(values) or None})")
        for value, (parameter, bound) in zip(values, parameters.items(), strict=True):
            if not bound < value <= LARGEST_SHAPE:
                raise ValueError(
                    f"{parameter} must be greater than {bound} and at most {LARGEST_SHAPE:g}"
                    f" (got {value})"
                )
        return shape

    def draw(self, rng: np.random.Generator, count: int) -> int:
        """Draw a timestep below ``count``; each has an equal part of the range 0 to 1."""
        high = count - 1 if self.high is None else self.high
        place = DENSITIES[self.density].draw(rng, *self.shape or ())
        return min(self.low + int(place * (high + 1 - self.low)), high)  # a place may round to 1


class Training(Section):
    """The training of one stage: adapter, optimizer, length and precision."""

    steps: Positive
    """The number of optimizer steps."""
    batch_size: Positive = 4
    """Pictures at a time on each GPU, those of the prior included."""
    accumulation: Positive = 1
    """Batches whose gradients are averaged into one optimizer step: two batches of 2 pictures train
    the same as one of 4."""
    adapter: AdapterSpec = AdapterSpec()
    """The adapter: kind, rank, targets."""
    optimizer: Optimizer = Optimizer()
    """The optimizer and its schedule."""
    precision: ChosenPrecision = "auto"
    """The precision of the frozen UNet's weights; ``auto``: bf16 on a GPU, fp32 on a CPU. An
    adapter's weights and optimizer are always fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cuda_graph: bool = True
    """Record the step as one CUDA graph, on a GPU, and replay it."""
    compile: bool = False
    """Compile the UNet, on a GPU: steps take about 3 % less time, but the first takes minutes."""
    timesteps: Timesteps = Timesteps()
    """The distribution of each picture's timestep."""
    noise_level: Levels | None = None
    """Stage II only: the range from which each picture's augmentation level is drawn, inclusive;
    ``None``: all levels of the model's schedule."""
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Gamma of the Min-SNR weighting of the MSE term; ``None``: no weighting. It does not apply to
    pictures preserved by ``prior.kind: output``, whose loss has no such term."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The decay of an exponential moving average of the adapter, which is then exported; ``None``:
    no average. The decay after t steps is at most (1 + t) / (10 + t), so that the average of a
    short run holds little of the initial weights."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """The number of newest checkpoints to keep."""

    def precision_on(self, device: "torch.device") -> Precision:
        """Return the precision of the frozen UNet on a device."""
        return _resolve(self.precision, device)


class Best(Section):
    """The choice of the validation whose adapter is exported."""

    figure: Annotated[str, name_in(JUDGED)] = "clip_i"
    """The figure to be best: ``clip_i``, likeness to the subject; ``clip_t``, likeness to the
    prompts; or ``held_out``, the loss on pictures held out of training."""
    keep_others: Annotated[float, Field(gt=0, le=1)] | None = 0.97
    """The least share of the base's CLIP-T that ``validation.other_prompts`` must keep; if no
    validation keeps it, the one that keeps most is exported. ``None``: no bound."""
    patience: Positive | None = None
    """Stop after this many validations in a row without a better one; ``None``: never."""


class Validation(Section):
    """Pictures and losses measured during training, for TensorBoard."""

    prompts: Prompts = ()
    """Prompts to sample, in which ``{}`` is ``evaluation.identifier``; none: no pictures."""
    stage_2_prompts: StagePrompts | None = None
    """Prompts for Stage II, one for each of ``prompts``, often the same without the subject's
    identifier; ``{}`` is ``evaluation.subject``. ``None``: the same."""
    other_prompts: Prompts = ()
    """Prompts without the subject, whose pictures training should not change."""
    through_stage_2: Literal["never", "last", "always"] = "last"
    """When Stage I's pictures are also shown enlarged by the base's Stage II, which is
    loaded for that and freed: never, once at the end, or at each validation."""
    loss_pictures: NonNegative = 50
    """The most training pictures whose loss is measured at fixed noise, each by itself; 0: none."""
    held_out: NonNegative = 0
    """Pictures held out of training, to measure the loss on pictures that are not learnt."""
    every: Positive = 500
    """Steps between validations; there is always one before the first step and one at the end."""
    best: Best | None = None
    """Export the best of the validations instead of the last step; ``None``: export the last."""
    seed: Seed = 0
    """The seed of every validation, so that only training changes the pictures."""
    sampling: Sampling = Sampling()
    """Steps, guidance and noise level, by stage."""

    @property
    def patience(self) -> int | None:
        """The validations without a better one after which a run stops; ``None``: it does not."""
        return self.best.patience if self.best else None

    @property
    def drawings(self) -> list[Drawing]:
        """The prompts and seeds of the pictures; the two lists are drawn one by one."""
        return [
            (prompt, self.seed + place)
            for prompts in (self.prompts, self.other_prompts)
            for place, prompt in enumerate(prompts)
        ]


class Expected(Section):
    """Scores that a run on certain data should reach, measured on another machine's run."""

    data: str
    """The ``data.source`` of the measured run; runs on other data are not judged."""
    clip_i: Annotated[float, Field(gt=-1, le=1)]
    """CLIP-I, generated pictures of the subject to real ones."""
    clip_t: Annotated[float, Field(gt=-1, le=1)]
    """CLIP-T of the subject's prompts."""
    clip_t_others: Annotated[float, Field(gt=-1, le=1)] | None = None
    """CLIP-T of the other prompts; ``None`` if there are no other prompts."""
    spread: Annotated[float, Field(gt=0)]
    """The distance from these scores that other seeds or processors can make."""


class Evaluation(Section):
    """The subject, and how well it was learnt (``python -m finetune.evaluate``)."""

    identifier: Words
    """The words that name the subject in prompts, such as ``sks octopus``, put in for ``{}`` there
    (:data:`finetune.recipe.prompt_lists.NAMES_IN` lists the fields)."""
    subject: Words
    """The subject in plain words, which replaces ``identifier`` in the text score (CLIP-T), and is
    put in for ``{}`` in prompts of its class."""
    prompts: Annotated[NamedPrompts, Field(min_length=1)]
    """Prompts that should show the subject, in which ``{}`` is the identifier; or the name of a
    shipped list, ``objects`` or ``live``, or of a ``.txt`` file with a prompt on each line."""
    stage_2_prompts: Annotated[StagePrompts | None, BeforeValidator(_read_list)] = None
    """Prompts for Stage II, one for each of ``prompts``, likewise, in which ``{}`` is the subject
    in plain words; ``None``: the same."""
    other_prompts: NamedPrompts = ()
    """Prompts without the subject, or the name of the list ``others``; training should not
    change their pictures."""
    class_prompts: NamedPrompts = ()
    """Prompts of the subject's class, such as ``a photo of a {}``, in which ``{}`` is the subject
    in plain words; their pictures should not show the subject (PRES). None: not scored."""
    pictures_per_prompt: Positive = 1
    """Pictures of each prompt, each from a seed of its own; DreamBooth takes 4."""
    clip: str = "openai/clip-vit-base-patch32"
    """The CLIP model that scores the pictures: a folder or hub name."""
    dino: str | None = None
    """The DINO or DINOv2 model that scores likeness, such as DreamBooth's ``facebook/dino-vits16``,
    or ``facebook/dinov2-small``: a folder or hub name; ``None``: not scored."""
    seed: Seed = 1000
    """The seed of the first picture, other than ``validation.seed``; every variant of the cascade
    draws from the same seeds."""
    sampling: Sampling | None = None
    """Steps, guidance and noise level, by stage; ``None``: as in validation."""
    expected: Expected | None = None
    """The scores that the run should reach; ``None``: not known."""

    def seed_of(self, place: int, number: int = 0) -> int:
        """Return the seed of a prompt's picture: the prompt's place among all, and its number."""
        return self.seed + SEEDS_APART * number + place

    @property
    def drawings(self) -> list[Drawing]:
        """The prompts and seeds of the pictures that are scored."""
        return [
            (prompt, self.seed_of(place, number))
            for number in range(self.pictures_per_prompt)
            for place, prompt in enumerate(self.prompts + self.other_prompts)
        ]


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name: its folder under ``runs_dir``."""
    seed: Seed = 0
    """The seed of the run. All its randomness derives from the seed and each picture's position in
    the run, so a global batch (over all processes and accumulated batches) is the same however it
    is divided."""
    base: Base
    """The cascade to fine-tune."""
    data: Data
    """The pictures to train on."""
    prior: Prior | None = None
    """Prior preservation, of one of two kinds; ``None``: none."""
    text: Text = Text()
    """The text encoder and its captions."""
    stage_1: Training | None = None
    """The training of Stage I; ``None``: it is not trained."""
    stage_2: Training | None = None
    """The training of Stage II, after Stage I if both are given; ``None``: it is not trained."""
    validation: Validation = Validation()
    """The pictures sampled during training."""
    evaluation: Evaluation | None = None
    """The scores of what was learnt; ``None``: they are not computed."""
    log_every: Positive = 10
    """Steps between TensorBoard points."""
    runs_dir: str = "runs"
    """The folder of all runs."""
    cache_dir: str = ".cache/finetune"
    """The folder that keeps decoded pictures, text encodings and class pictures between runs."""

    @model_validator(mode="wrap")
    @classmethod
    def _check_sections_together(cls, tree: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Report mistakes between sections along with those within them."""
        mistakes: list[Any] = []
        between = dict(find_mistakes(tree))
        try:
            recipe = handler(tree)
            between |= dict(recipe._find_nameless())
            recipe = recipe._put_names_in()
            if recipe.evaluation:
                between |= find_absent_subject(
                    recipe.evaluation.identifier, recipe.evaluation.prompts
                )
            if recipe.validation.best and recipe.evaluation:
                between |= find_shared_pictures(
                    recipe.validation.drawings, recipe.evaluation.drawings
                )
        except ValidationError as error:
            mistakes += error.errors(include_url=False)
        places = {mistake["loc"] for mistake in mistakes}
        for path, message in between.items():
            kind = PydanticCustomError("value_error", "{message}", {"message": message})
            place = tuple(path.split("."))
            if place not in places:
                mistakes.append({"type": kind, "loc": place, "input": None})
        if mistakes:
            raise ValidationError.from_exception_data(cls.__name__, mistakes)
        return recipe

    def _find_nameless(self) -> Iterator[tuple[str, str]]:
        """Yield the path and message of each field with a ``{}`` that nothing can be put in for."""
        for name, fields in NAMES_IN.items() if self.evaluation is None else ():
            for field, prompts in dict(self)[name] or ():
                if field in fields and put_in("", prompts) != prompts:
                    words = f"evaluation.{fields[field]}"
                    yield f"{name}.{field}", f"{SUBJECT} is {words}: give that, or write it out"

    def _put_names_in(self) -> Self:
        """Put the subject's names in for ``{}`` in all prompts."""
        names, filled = dict(self.evaluation or ()), {}
        for name, fields in NAMES_IN.items() if names else ():
            if section := dict(self)[name]:
                own = dict(section)
                update = {
                    field: put_in(names[words], own[field]) for field, words in fields.items()
                }
                filled[name] = section.model_copy(update=update)
        return self.model_copy(update=filled)

    @property
    def class_pictures(self) -> PicturePrior | None:
        """The section of class pictures; ``None`` if the recipe uses none."""
        return self.prior if isinstance(self.prior, PicturePrior) else None

    @property
    def trained(self) -> tuple[Stage, ...]:
        """The stages that this recipe trains, in order."""
        sections = {1: self.stage_1, 2: self.stage_2}
        return tuple(stage for number, stage in STAGES.items() if sections[number] is not None)

    def training(self, stage: Stage) -> Training:
        """Return the section of a trained stage."""
        section = {1: self.stage_1, 2: self.stage_2}[stage.number]
        assert section is not None
        return section

    def source(self, stage: Stage) -> "Source":
        """Return the source of a stage's base model."""
        return self.base.source(stage)

    def precisions_on(self, device: "torch.device") -> dict[int, Precision]:
        """Return the precision of each UNet on a device; an untrained stage takes the other's."""
        trained = {s.number: self.training(s).precision_on(device) for s in self.trained}
        return {number: trained.get(number, next(iter(trained.values()))) for number in STAGES}

    @property
    def shows_stage_2(self) -> bool:
        """True if Stage I's validation pictures are also shown enlarged by Stage II."""
        drawn = self.validation.prompts or self.validation.other_prompts
        shown = self.stage_1 and drawn and self.validation.through_stage_2 != "never"
        return bool(shown) and self.base.stage_2 is not None

    @property
    def crops_px(self) -> list[int]:
        """The sides of the crops that the stages are trained on, in pixels, ascending."""
        return sorted({self.source(stage).picture_size_px for stage in self.trained})

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs_dir) / self.name

    @property
    def cache(self) -> Path:
        """``cache_dir`` as a path."""
        return Path(self.cache_dir)

    def to_yaml(self, *, shorten: bool = False) -> str:
        """Write the resolved recipe, defaults included; loading it gives the same recipe.

        Args:
            shorten: cut long lists short, for people. The text is no recipe then, and not taken for
                one.
        """
        tree = self.model_dump(mode="json")
        tree = _shorten(tree) if shorten else tree
        return yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=100, allow_unicode=True)


def _shorten(tree: Any) -> Any:
    """Cut long lists in a tree short; their last item then is a mapping, which no list may hold."""
    if isinstance(tree, dict):
        return {name: _shorten(below) for name, below in tree.items()}
    if isinstance(tree, list) and len(tree) > LONG:
        return [*tree[:SHOWN], {"and": f"{len(tree) - SHOWN} more"}]
    return tree
