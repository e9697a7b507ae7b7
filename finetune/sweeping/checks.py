"""Checks of a sweep's runs together, for what would stop one after others have been trained."""

import sys
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial

from tqdm import tqdm

from adapters.errors import UserError, quiet_libraries
from finetune.recipe.schema import Evaluation, Recipe
from finetune.sweeping.points import Point, check_none
from finetune.sweeping.progress import is_trained


def find_trained(points: Sequence[Point]) -> set[str]:
    """Find the runs that are trained to the end, and check the others.

    Raises:
        UserError: with the mistakes of all runs.
    """
    import torch

    from finetune.run.early_checks import check_recipe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, mistakes = set(), dict[str, list[str]]()
    for point in points:
        try:
            if is_trained(point.recipe):
                trained.add(point.name)
            else:
                check_recipe(point.recipe, device)
        except UserError as error:
            mistakes.setdefault(str(error), []).append(point.name)
    check_none(mistakes, len(points))
    return trained


def check_material(points: Sequence[Point], trained: Collection[str], count: int) -> None:
    """Load the models that score, once each, and the pictures of which some are held out.

    Args:
        points: the runs that are to be trained or scored.
        trained: the names of those that are only to be scored.
        count: the number of all runs.

    Raises:
        UserError: with the mistakes of all runs: a model or picture is missing or damaged, or no
            picture would be left to train on.
    """
    quiet_libraries()
    mistakes, failures = dict[str, list[str]](), dict[Hashable, str | None]()
    for point in points:
        recipe, settings = point.recipe, point.recipe.evaluation
        assert settings is not None
        models = (settings.clip, settings.dino)
        checks: dict[Hashable, Callable[[], None]] = {models: partial(_load_encoders, settings)}
        if recipe.validation.held_out and point.name not in trained:
            pictures = (recipe.validation.held_out, recipe.data.model_dump_json(), recipe.cache)
            checks[pictures] = partial(_check_held_out, recipe)
        for subject, check in checks.items():
            if subject not in failures:
                failures[subject] = _find_failure(check)
            if failure := failures[subject]:
                mistakes.setdefault(failure, []).append(point.name)
    check_none(mistakes, count)


def check_at_once(points: Sequence[Point], at_once: int) -> None:
    """Say how many runs fit on the GPU at once, if several are asked for and there is one.

    Raises:
        UserError: if fewer fit.
    """
    import torch

    from finetune.sweeping.room import check_room

    together = min(at_once, len(points))
    if together > 1 and torch.cuda.is_available():
        recipes = [point.recipe for point in points]
        said = check_room(recipes, together, torch.device("cuda"))
        tqdm.write(said, file=sys.stderr)


def _load_encoders(settings: Evaluation) -> None:
    import torch

    from finetune.evaluation.measurement import Encoders

    Encoders.load(settings, torch.device("cpu"))


def _check_held_out(recipe: Recipe) -> None:
    from finetune.data.pictures import load_pictures
    from finetune.run.fixed_losses import check_held_out

    pictures = load_pictures(recipe.data, recipe.cache, *recipe.crops_px)
    check_held_out(recipe.validation.held_out, len(pictures))


def _find_failure(check: Callable[[], None]) -> str | None:
    """Return the sentence of a check's UserError; ``None``: it raises none."""
    try:
        check()
    except UserError as error:
        return str(error)
    return None
