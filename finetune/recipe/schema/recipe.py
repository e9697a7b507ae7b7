"""A whole recipe: its sections, and what follows from several of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

import yaml
from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapters.arguments import expand_home
from finetune.recipe.consistency import find_absent_subject, find_mistakes, find_shared_pictures
from finetune.recipe.prompt_lists import NAMES_IN, SUBJECT, put_in
from finetune.recipe.schema.base import Base
from finetune.recipe.schema.data import Data
from finetune.recipe.schema.evaluation import Evaluation
from finetune.recipe.schema.fields import LONGEST_NAME, NAME, PathText, Positive, Section, Seed
from finetune.recipe.schema.prior import PicturePrior, Prior
from finetune.recipe.schema.text import Text
from finetune.recipe.schema.training import Training
from finetune.recipe.schema.validation import Validation
from finetune.recipe.yaml12 import Dumper
from finetune.step.stages import STAGES, Stage
from unets.precision import Precision

if TYPE_CHECKING:  # so that mistakes are reported without these slow imports
    import torch

    from adapters.base.source import Source


TrackerName: TypeAlias = Literal[
    "tensorboard",
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "trackio",
    "wandb",
]
"""The trackers that Accelerate knows."""

LONG, SHOWN = 10, 3
"""The number of items above which a list is long, and of those that are shown of it."""


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=NAME, max_length=LONGEST_NAME)
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
    trackers: Annotated[tuple[TrackerName, ...], Field(strict=False)] = ("tensorboard",)
    """The trackers of curves and pictures: ``tensorboard`` first, and any others that Accelerate
    knows beside it, whose packages must be installed and logged in. Each stage is a run of its own
    there, named after the run and the stage."""
    runs_dir: PathText = "runs"
    """The folder of all runs."""
    cache_dir: PathText = ".cache/finetune"
    """The folder that keeps decoded pictures, text encodings and class pictures between runs."""

    @field_validator("trackers")
    @classmethod
    def _check_tensorboard_first(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if trackers[:1] != ("tensorboard",):
            raise ValueError(
                "must begin with tensorboard, which always shows a run; others stand after it"
            )
        if len({*trackers}) < len(trackers):
            raise ValueError("must name each tracker once")
        return trackers

    def __repr__(self) -> str:
        steps = [f"{s.name}: {self.training(s).steps:,} steps" for s in self.trained]
        return f"Recipe({', '.join([repr(self.name), *steps, self.data.source])})"

    __str__ = __repr__

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
        return expand_home(self.runs_dir) / self.name

    @property
    def cache(self) -> Path:
        """``cache_dir`` as a path."""
        return expand_home(self.cache_dir)

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
