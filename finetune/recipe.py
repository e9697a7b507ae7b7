"""Recipes: one YAML file says all there is to say about a run, checked before anything is loaded.

Every section below is a pydantic model: its fields, their types and ranges are the schema, and the
text under each field is its documentation.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.bases import Source
from adapters.errors import UserError
from adapters.kinds import AdapterSpec
from adapters.sampling import Sampling
from finetune.optimizers import OPTIMIZERS, SCHEDULES
from finetune.stages import STAGES, Stage

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Prompts = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about names and types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Base(Section):
    """The cascade to teach: folders or hub names in diffusers' layout."""

    stage_1: str
    """Stage I; its text encoder and tokenizer are those of the whole cascade."""
    stage_2: str | None = None
    """Stage II; needed to train it, and shown in validation pictures where given."""
    stage_3: str | None = None
    """The x4 upscaler, for pictures only."""
    revision: str | None = None
    """The hub revision of the stages; ``None``: the newest."""
    variant: str | None = None
    """The weights' variant in the hub repository, such as ``fp16``; ``None``: the plain files."""


class Data(Section):
    """Where the pictures and captions come from, and how they are cropped."""

    source: str
    """A folder of pictures (with ``metadata.jsonl`` or ``.txt`` captions, or none), or whatever
    ``datasets.load_dataset`` takes: a hub name or a local path."""
    prompt: str | None = None
    """One caption for all pictures; ``None``: each picture has its own."""
    split: str = "train"
    """The split of the dataset."""
    image_column: str = "image"
    """The column that holds the pictures."""
    caption_column: str = "text"
    """The column that holds the captions; not read where ``prompt`` is given."""
    center_shift: Fraction = 0.1
    """How far the square crop's centre may shift, as a fraction of the crop's side."""
    horizontal_flip: bool = False
    """Mirror every other picture at random."""
    caption_dropout: Fraction = 0.1
    """The share of captions replaced by the empty one, which guidance is taken against."""


class Prior(Section):
    """Prior preservation: pictures of the subject's class, so that the class is not forgotten."""

    prompts: Annotated[Prompts, Field(min_length=1)]
    """What class pictures show, in turn; also their captions."""
    count: Positive = 100
    """How many class pictures."""
    folder: str | None = None
    """A folder of class pictures to take instead of sampling them from the base cascade."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The share of each batch that is class pictures: at least one, and never all."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """The weight of the class pictures' loss beside that of the subject's."""


class Text(Section):
    """The text encoder: its precision, its place, and what it is given."""

    precision: Literal["auto", "fp32", "bf16", "int8", "nf4"] = "auto"
    """The text encoder's weights; ``auto``: bf16 on a GPU, fp32 on a CPU."""
    device: Literal["auto", "cpu"] = "auto"
    """Where captions are encoded; ``auto``: on the training device."""
    clean_caption: bool = True
    """Clean captions as IF's pipelines do by default (HTML, links, odd punctuation)."""


class Optimizer(Section):
    """The optimizer of the adapter's parameters."""

    name: str = "adamw_8bit"
    """One of the names in ``finetune.optimizers.OPTIMIZERS``."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """The peak learning rate."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """Decay of the first and second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    lora_plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+: the learning rate of the B matrices over that of the A matrices."""
    schedule: str = "constant"
    """One of the names in ``finetune.optimizers.SCHEDULES``."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from zero."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the gradient to this norm; ``None``: never."""

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        for field, table in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            value = getattr(self, field)
            if value not in table:
                raise ValueError(f"{field} must be one of {', '.join(table)} (got {value!r})")
        return self


class Training(Section):
    """What is trained in one stage, and for how long."""

    steps: Positive
    """Optimizer steps."""
    batch_size: Positive = 4
    """Pictures a step on each GPU, class pictures included."""
    accumulation: Positive = 1
    """Batches whose gradients are averaged into one optimizer step."""
    adapter: AdapterSpec = AdapterSpec()
    """The adapter: kind, rank, targets."""
    optimizer: Optimizer = Optimizer()
    """The optimizer and its schedule."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The frozen UNet's weights; ``auto``: bf16 on a GPU, fp32 on a CPU. Adapters train in fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    noise_level: Annotated[tuple[int, int], Field(strict=False)] = (0, 999)
    """Stage II only: the range from which each picture's augmentation level is drawn, inclusive."""
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Min-SNR weighting of the MSE term; ``None``: none."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Keep an exponential moving average of the adapter and export that; ``None``: no."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints to keep."""


class Validation(Section):
    """Pictures sampled while training, for TensorBoard."""

    prompts: Prompts = ()
    """What to sample; none: no validation."""
    every: Positive = 500
    """Steps between validations; one is always made at the end."""
    seed: int = 0
    """The seed of every validation, so that pictures differ by training alone."""
    sampling: Sampling = Sampling()
    """Steps, guidance and noise level, by stage."""


class Comparison(Section):
    """The picture of the base beside the fine-tuned cascade (``python -m finetune.compare``)."""

    prompts: Annotated[Prompts, Field(min_length=1)]
    """Prompts that should show the subject."""
    other_prompts: Prompts = ()
    """Prompts of other things, which should not have changed."""
    subject: str
    """The subject in plain words, which the text score (CLIP-T) puts in place of ``identifier``."""
    identifier: str
    """The words of the prompts that name the subject, such as ``sks octopus``."""
    clip: str
    """The CLIP model of the scores: folder or hub name."""
    seed: int = 0
    """The seed of the pictures."""


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name: its folder under ``runs_dir``."""
    seed: int = 0
    """All randomness of the run derives from (seed, rank, step)."""
    base: Base
    """The cascade to teach."""
    data: Data
    """The pictures to teach it."""
    prior: Prior | None = None
    """Prior preservation; ``None``: without."""
    text: Text = Text()
    """How captions are encoded."""
    stage_1: Training | None = None
    """How to train Stage I; ``None``: not at all."""
    stage_2: Training | None = None
    """How to train Stage II, after Stage I where both are given; ``None``: not at all."""
    validation: Validation = Validation()
    """What to sample while training."""
    comparison: Comparison | None = None
    """The picture and scores of base and fine-tuned cascade; ``None``: none."""
    log_every: Positive = 10
    """Steps between TensorBoard points."""
    runs_dir: str = "runs"
    """Where runs are written."""
    cache_dir: str = ".cache/finetune"
    """Where decoded pictures, text embeddings and class pictures are kept between runs."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.trained:
            raise ValueError("nothing to train: give a stage_1 section, a stage_2 section or both")
        if self.stage_2 is not None:
            if self.base.stage_2 is None:
                raise ValueError("base.stage_2 must name a Stage II model where stage_2 is trained")
            low, high = self.stage_2.noise_level
            if not 0 <= low <= high:
                raise ValueError(
                    "stage_2.noise_level must be [low, high] with 0 <= low <= high"
                    f" (got [{low}, {high}])"
                )
        for stage in self.trained:
            if self.prior and self.training(stage).batch_size < 2:
                raise ValueError(
                    f"{stage.name}.batch_size must be at least 2 with prior preservation"
                )
        return self

    @property
    def trained(self) -> tuple[Stage, ...]:
        """The stages that this recipe trains, in order."""
        sections = {1: self.stage_1, 2: self.stage_2}
        return tuple(stage for number, stage in STAGES.items() if sections[number] is not None)

    def training(self, stage: Stage) -> Training:
        """The training section of a stage that is trained."""
        section = {1: self.stage_1, 2: self.stage_2}[stage.number]
        assert section is not None
        return section

    def base_of(self, stage: Stage) -> str:
        """The base model of a stage."""
        name = {1: self.base.stage_1, 2: self.base.stage_2}[stage.number]
        assert name is not None
        return name

    def source(self, stage: Stage) -> Source:
        """Where the base model of a stage is."""
        return Source(self.base_of(stage), stage.number, self.base.revision, self.base.variant)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs_dir) / self.name

    @property
    def cache(self) -> Path:
        """Where what is costly to make is kept between runs."""
        return Path(self.cache_dir)

    def to_yaml(self) -> str:
        """The resolved recipe, defaults included; loading it gives the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: ``dotted.key=value`` pairs laid over it, values in YAML.

    Raises:
        UserError: listing every unknown key (with the closest valid name), wrong type and value
            out of range, each with its path.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"The recipe {path} is not valid YAML: {error}.") from error
    if not isinstance(tree, dict):
        raise UserError(f"The recipe {path} must be a YAML mapping (got {type(tree).__name__}).")
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        rows = "\n".join(f"  {row}" for row in _explain(error))
        raise UserError(
            f"The recipe {path} has {error.error_count()} mistake(s):\n{rows}"
        ) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"An override must be key=value (got {override!r}).")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(
                f"The override {override!r} goes below {parent!r}, which is no section."
            )
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"The value of the override {override!r} is not valid YAML.") from error


def _explain(error: ValidationError) -> list[str]:
    """One line a mistake: path, expected, found."""
    rows = []
    for mistake in error.errors():
        path = ".".join(str(part) for part in mistake["loc"])
        message = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            names = list(_section_at(mistake["loc"][:-1]).model_fields)
            close = difflib.get_close_matches(str(mistake["loc"][-1]), names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"valid: {', '.join(names)}"
            rows.append(f"{path}: unknown key; {hint}")
        elif mistake["type"] in ("missing", "value_error"):
            rows.append(f"{path}: {message}" if path else message)
        else:
            rows.append(f"{path}: {message} (got {mistake['input']!r})")
    return rows


def _section_at(path: tuple[int | str, ...]) -> type[BaseModel]:
    """The section that a path of field names leads to."""
    section: type[BaseModel] = Recipe
    for name in path:
        annotation = section.model_fields[str(name)].annotation
        options = getattr(annotation, "__args__", (annotation,))
        section = next(
            option
            for option in options
            if isinstance(option, type) and issubclass(option, BaseModel)
        )
    return section
