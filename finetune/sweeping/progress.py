"""The progress of a run of a sweep, by its folder: trained, in which time, and scored."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from adapters.atomic import write_text
from finetune.recipe.schema import Recipe
from finetune.sweeping.names import name_variant
from finetune.sweeping.scoring import read_scores

TIMES = TypeAdapter(dict[str, Annotated[FiniteFloat, Field(ge=0)]])
"""The shape of the file of a training's time."""


def is_trained(recipe: Recipe) -> bool:
    """Tell whether all stages of a run are trained to the end and exported.

    Raises:
        UserError: if its folder holds another recipe's run.
    """
    from finetune.run.folders import list_unfinished

    return not list_unfinished(recipe)


def is_scored(recipe: Recipe, scales: Sequence[float]) -> bool:
    """Tell whether a trained run is scored at all scales, with these adapters and settings."""
    variants = read_scores(recipe)["variants"]
    return all(name_variant(scale) in variants for scale in scales)


def add_seconds(recipe: Recipe, seconds: float) -> None:
    """Add to the time that a run's training has taken, over all its attempts."""
    record = {"seconds": round((read_seconds(recipe) or 0) + seconds, 1)}
    write_text(_time_file(recipe), json.dumps(record) + "\n")


def read_seconds(recipe: Recipe) -> float | None:
    """Read how long a run's training took; ``None``: not known."""
    try:
        return TIMES.validate_json(_time_file(recipe).read_bytes())["seconds"]
    except (OSError, ValidationError, KeyError):
        return None


def _time_file(recipe: Recipe) -> Path:
    return recipe.folder / "training_time.json"
