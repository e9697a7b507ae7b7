"""The points of a sweep: runs of their own, each with its recipe, checked before the first one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from adapters.arguments import expand_home
from adapters.errors import UserError, closest, listed
from adapters.mistakes import list_mistakes
from finetune.recipe.file import MistakesError, load_recipe
from finetune.recipe.schema import Recipe
from finetune.sweeping.axes import draw_random, expand_grid, list_overrides
from finetune.sweeping.names import name_runs, name_variant, shorten_keys
from finetune.sweeping.schema import Sweep

SHOWN = 3
"""The number of runs named with a mistake that they share."""


Trial: TypeAlias = tuple[tuple[str, ...], int]
"""The values that scores are averaged across, and the seed."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    recipe: Recipe
    """Its recipe, named after the values."""
    settings: Mapping[str, str]
    """The values that the sweep compares, by short name."""
    across: Mapping[str, str]
    """The values across which scores are averaged, such as the subject's name, by short name."""
    combination: str
    """The name of the combination of values that the sweep compares."""
    seed: int
    """The seed of its training."""

    @property
    def trial(self) -> Trial:
        """The part that it shares with a run of each other combination."""
        return tuple(self.across.values()), self.seed

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
    folder = expand_home(given.runs_dir) / name
    if sweep.random is None:
        combinations = expand_grid(sweep.listed_axes)
    else:
        combinations = draw_random(sweep.axes, sweep.random, sweep.seed)
    axes = sweep.all_axes
    labels = shorten_keys([axis.named_after for axis in axes])
    own_labels, across_labels = labels[: len(sweep.axes)], labels[len(sweep.axes) :]
    runs = [
        (values, others, seed)
        for values in combinations
        for others in expand_grid(sweep.across_axes)
        for seed in sweep.seeds or (None,)
    ]
    names = name_runs(labels, [(values + others, seed) for values, others, seed in runs])
    titles = name_runs(own_labels, [(values, None) for values in combinations])
    title_of = dict(zip(combinations, titles, strict=True))
    points, mistakes, twins = [], dict[str, list[str]](), dict[str, str]()
    for run_name, (values, others, seed) in zip(names, runs, strict=True):
        own = [] if seed is None else [f"seed={seed}"]
        own += [f"name={run_name}", f"runs_dir={folder}"]
        overrides = [*sweep.overrides, *list_overrides(axes, values + others), *own]
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
            points.append(
                Point(
                    recipe=recipe,
                    settings=dict(zip(own_labels, values, strict=True)),
                    across=dict(zip(across_labels, others, strict=True)),
                    combination=title_of[values],
                    seed=recipe.seed,
                )
            )
    check_none(mistakes, len(runs))
    return folder, points


def find_reference(sweep: Sweep, points: Sequence[Point]) -> str:
    """Return the name of the combination and scale that others are compared with.

    Raises:
        UserError: if the sweep names one that it does not have.
    """
    names = list(dict.fromkeys(point.combination for point in points))
    wanted = names[0] if sweep.against is None else sweep.against
    name, equals, text = wanted.partition("=")
    scales = [name_variant(scale) for scale in sweep.scales]
    scale = text if equals else "1" if "1" in scales else scales[0]
    if name not in names:
        raise UserError(f"There is no combination {name!r} to compare with; {closest(name, names)}")
    if scale not in scales:
        raise UserError(
            f"There is no scale {scale!r} to compare with, in {wanted!r}; valid: {listed(scales)}"
        )
    return f"{name}={scale}"


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
        f"{mistake} ({'all runs' if len(names) == count > 1 else listed(names, SHOWN)})"
        for mistake, names in mistakes.items()
    ]
    raise UserError(f"None of the sweep's runs was started: they have {list_mistakes(rows)}")
