"""The points of a sweep: runs of their own, each with its recipe, checked before the first one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import UserError, listed
from finetune.recipe.file import MistakesError, load_recipe
from finetune.recipe.schema import Recipe
from finetune.sweeping.axes import draw_random, expand_grid, list_overrides
from finetune.sweeping.names import name_runs, shorten_keys
from finetune.sweeping.schema import Sweep

SHOWN = 3
"""The number of runs named with a mistake that they share."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    recipe: Recipe
    """Its recipe, named after the values."""
    settings: Mapping[str, str]
    """The values that the sweep compares, by short name."""
    across: Mapping[str, str]
    """The values across which scores are averaged, such as the subject's name, by short name."""
    seed: int
    """The seed of its training."""

    @property
    def name(self) -> str:
        """The run's name, and its folder's."""
        return self.recipe.name

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.recipe.folder

    @property
    def recipe_file(self) -> Path:
        """The file that the run is trained and scored from, so that it can be repeated alone."""
        return self.folder / "recipe.yaml"

    @property
    def adapters(self) -> Path:
        """The folder of the trained adapters."""
        return self.folder / "adapters"


def plan_points(sweep: Sweep) -> tuple[Path, list[Point]]:
    """List the runs of a sweep, without writing anything.

    Returns:
        The sweep's folder, and the runs.

    Raises:
        UserError: with the mistakes of all runs, or if the recipe cannot be scored.
    """
    given = load_recipe(sweep.recipe, sweep.overrides)
    check_scores(given)
    name = sweep.name or f"{given.name}-sweep"
    folder = Path(given.runs_dir) / name
    if sweep.random is None:
        combinations = expand_grid(sweep.listed_axes)
    else:
        combinations = draw_random(sweep.axes, sweep.random, sweep.seed)
    axes, compared = sweep.all_axes, len(sweep.axes)
    labels = shorten_keys([axis.named_after for axis in axes])
    runs = [
        (values + others, seed)
        for values in combinations
        for others in expand_grid(sweep.across_axes)
        for seed in sweep.seeds or (None,)
    ]
    names = name_runs(labels, runs)
    points, mistakes, twins = [], dict[str, list[str]](), dict[str, str]()
    for run_name, (values, seed) in zip(names, runs, strict=True):
        own = [] if seed is None else [f"seed={seed}"]
        own += [f"name={run_name}", f"runs_dir={folder}"]
        overrides = [*sweep.overrides, *list_overrides(axes, values), *own]
        try:
            recipe = load_recipe(sweep.recipe, overrides)
            check_scores(recipe)
        except MistakesError as error:
            for row in error.rows:
                mistakes.setdefault(row, []).append(run_name)
        except UserError as error:
            mistakes.setdefault(str(error), []).append(run_name)
        else:
            twin = twins.setdefault(recipe.model_dump_json(exclude={"name"}), run_name)
            if twin != run_name:
                mistake = f"the values mean the same as those of {twin}; leave one out"
                mistakes.setdefault(mistake, []).append(run_name)
            pairs = list(zip(labels, values, strict=True))
            points.append(
                Point(recipe, dict(pairs[:compared]), dict(pairs[compared:]), recipe.seed)
            )
    check_none(mistakes, len(runs))
    return folder, points


def check_scores(recipe: Recipe) -> None:
    """Raise a UserError if a recipe's runs cannot be placed in fidelity and forgetting."""
    if recipe.evaluation is None or not recipe.evaluation.other_prompts:
        raise UserError(
            "A sweep compares fidelity with forgetting: the recipe needs an evaluation section with"
            " prompts of the subject and other_prompts, of other things."
        )


def check_none(mistakes: Mapping[str, list[str]], count: int) -> None:
    """Raise one UserError with the mistakes that runs have, each with the names of these runs.

    Args:
        mistakes: the names of the runs by mistake.
        count: the number of runs.
    """
    if not mistakes:
        return
    rows = [
        f"  {mistake} ({'all runs' if len(names) == count > 1 else listed(names, SHOWN)})"
        for mistake, names in mistakes.items()
    ]
    raise UserError(
        f"The sweep's runs have {len(rows)} mistake(s), and none was started:\n" + "\n".join(rows)
    )
