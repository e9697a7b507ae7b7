"""Score the runs of sweeps beside what is true of the embedded world; see `models/truth.py`.

Nothing is drawn but the base's own objects, once and into the cache: a sweep has kept the pictures
of its runs and of the base. What several runs are compared with is scored once for all of them.
"""

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm
from typing_extensions import TypedDict

from adapters.errors import UserError
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Evaluation, Recipe
from finetune.step.stages import STAGES
from finetune.sweeping.points import Trial
from models import truth
from models.picture_scores import Scores, read_captioned, render_true, score, score_shapes
from models.world import caption, parse_caption

RESULTS = "results.json"
"""The file in a sweep's folder that lists its runs."""

Task: TypeAlias = Callable[[], Scores]
"""Pictures to score, in any process."""


class KeptRun(TypedDict):
    """The part of a run in a sweep's results that is read here."""

    name: str
    across: dict[str, str]
    seed: int


class KeptOutcome(TypedDict):
    """The part of an outcome in a sweep's results that is read here."""

    settings: dict[str, str]
    scale: float
    runs: list[KeptRun]


class KeptResults(TypedDict):
    """The part of a sweep's results that is read here."""

    outcomes: list[KeptOutcome]


KEPT = TypeAdapter(KeptResults)


@dataclass(frozen=True)
class Run:
    """A run of a sweep, at one adapter scale."""

    recipe: Recipe
    combination: str
    """The values that the sweep compares, and the scale, in words."""
    across: Mapping[str, str]
    """The values across which the sweep averages, such as the subject's name."""
    seed: int
    scale: float

    @property
    def settings(self) -> Evaluation:
        """The recipe's section of evaluation, which every run of a sweep has."""
        assert self.recipe.evaluation is not None
        return self.recipe.evaluation

    @property
    def trial(self) -> Trial:
        """What it has in common with a run of each other combination."""
        return tuple(self.across.values()), self.seed


def read_runs(folder: Path) -> list[Run]:
    """Read the runs of a sweep that are scored, at each scale.

    Raises:
        UserError: if the folder is not a sweep's.
    """
    try:
        results = KEPT.validate_json((folder / RESULTS).read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{folder} is no folder of a sweep with a {RESULTS} of this version: run the sweep (or"
            " run it again: nothing that is trained is trained twice)."
        ) from error
    runs = []
    for outcome in results["outcomes"]:
        values = [f"{name} {value}" for name, value in outcome["settings"].items()]
        combination = ", ".join([*values, f"scale {outcome['scale']:g}"])
        for run in outcome["runs"]:
            place = [f"name={run['name']}", f"runs_dir={folder}"]  # it may have been moved
            recipe = load_recipe(folder / run["name"] / "recipe.yaml", place)
            runs.append(Run(recipe, combination, run["across"], run["seed"], outcome["scale"]))
    return runs


def measure_runs(runs: Sequence[Run], processes: int) -> list[dict[str, Scores]]:
    """Score runs, and what each is compared with.

    Args:
        runs: the runs.
        processes: the number of processes that score at once, each on one core.

    Returns:
        For each run the scores by column of `truth.COLUMNS`; `true` has no shapes: they are near 1.

    Raises:
        UserError: if a picture or model is missing or damaged, or a caption is not of this world.
    """
    tasks: dict[str, Task] = {}
    names = [{column: _name(column, run) for column in SCORERS} for run in runs]
    for run, own in zip(runs, names, strict=True):
        tasks |= {own[column]: partial(scorer, run) for column, scorer in SCORERS.items()}
    found = work_off(tasks, processes)
    return [{column: found[name] for column, name in own.items()} for own in names]


def work_off(tasks: Mapping[str, Task], processes: int) -> dict[str, Scores]:
    """Do tasks, several at once, and return their results by name."""
    if processes == 1:
        return {name: task() for name, task in tqdm(tasks.items(), desc="Scoring", unit="set")}
    with ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),  # torch's threads do not survive a fork
        initializer=_use_one_core,
    ) as pool:
        futures: dict[str, Future[Scores]] = {n: pool.submit(task) for n, task in tasks.items()}
        try:
            bar = tqdm(futures.items(), desc="Scoring", unit="set")
            return {name: future.result() for name, future in bar}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _use_one_core() -> None:
    import torch

    from adapters.errors import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()


def _name(column: str, run: Run) -> str:
    """Name what a column's scores of a run depend on, so that runs share what they have in common.

    The base's and the true scores depend on the pictures of the subject and on the prompts, those
    of its own objects on how it draws.
    """
    recipe, settings = run.recipe, run.settings.model_dump(mode="json", exclude={"expected"})
    drawing = [recipe.base.model_dump(mode="json"), recipe.validation.sampling.model_dump()]
    depends_on: Any = {
        "fine_tuned": [str(recipe.folder), run.scale],
        "base": [drawing, settings, recipe.data.model_dump(mode="json"), recipe.runs_dir],
        "true": [settings, recipe.data.model_dump(mode="json")],
        "own": [drawing, _list_own(run.settings), settings["sampling"], settings["seed"]],
    }[column]
    return json.dumps([column, depends_on], default=str)


def _list_captions(settings: Evaluation) -> list[str]:
    """List the captions of the prompts that are scored, once each."""
    prompts = [*settings.prompts, *settings.other_prompts]
    return [prompt.replace(settings.identifier, settings.subject) for prompt in prompts]


def _list_own(settings: Evaluation) -> list[str]:
    """Caption the base's own objects, on the backgrounds of the prompts that are scored."""
    places = [place or 0 for _, place in map(parse_caption, _list_captions(settings))]
    return [caption(thing, place) for thing, place in zip(truth.OWN, cycle(places), strict=False)]


def score_fine_tuned(run: Run) -> Scores:
    """Score the pictures that the sweep has drawn with a run's adapters."""
    from finetune.sweeping.scoring import pictures_folder

    return _score_kept(run, pictures_folder(run.recipe, run.scale))


def score_base(run: Run) -> Scores:
    """Score the pictures that the sweep has drawn with the base for a run's prompts."""
    from finetune.sweeping.scoring import base_folder

    return _score_kept(run, base_folder(run.recipe))


def _score_kept(run: Run, folder: Path) -> Scores:
    from finetune.evaluation.drawing import list_shots
    from finetune.sweeping.scoring import read_drawn

    shots = list_shots(run.settings)
    drawn = read_drawn(folder, len(shots))
    if drawn is None:
        raise UserError(f"Pictures in {folder} are missing or damaged: run the sweep again.")
    shown = [i for i, shot in enumerate(shots) if shot.group != "class"]
    return _score([drawn[0][i] for i in shown], [shots[i].text for i in shown], run)


def score_true(run: Run) -> Scores:
    """Score true renders of a run's prompts, but not their shapes."""
    captions = _list_captions(run.settings)
    pictures = render_true(captions, truth.DRAWS, run.settings.seed, _size_px(run.recipe))
    return _score(
        pictures, [text for text in captions for _ in range(truth.DRAWS)], run, shapes=False
    )


def _score(
    pictures: Sequence[Any], captions: Sequence[str], run: Run, *, shapes: bool = True
) -> Scores:
    from finetune.evaluation.encoders import ClipScorer

    photos, _ = read_captioned(run.recipe.data, run.recipe.cache, _size_px(run.recipe))
    scorer = ClipScorer(run.settings.clip)
    return score(pictures, captions, run.settings.subject, photos, scorer, shapes=shapes)


def score_own(run: Run) -> Scores:
    """Draw and score the objects that the base was trained on; kept drawings are read."""
    from adapters.arguments import find_device
    from finetune.evaluation.drawing import Desk, list_shots

    captions = _list_own(run.settings)
    empty = {"other_prompts": (), "class_prompts": (), "stage_2_prompts": None}
    fields = {"prompts": tuple(captions), "pictures_per_prompt": 1, **empty}
    settings = run.settings.model_copy(update=fields)
    recipe = run.recipe.model_copy(update={"evaluation": settings})
    shots = list_shots(settings)
    desk = Desk.of(recipe, settings, shots, find_device("auto"))
    with tqdm(total=len(shots), desc="Drawing own objects", disable=True) as progress:
        drawn = desk.draw_base(progress)
    return {"shape": fmean(score_shapes([sample.final for sample in drawn], captions))}


SCORERS: Mapping[str, Callable[[Run], Scores]] = {
    "own": score_own,
    "base": score_base,
    "true": score_true,
    "fine_tuned": score_fine_tuned,
}
"""What makes each column's scores, the longest first."""


def _size_px(recipe: Recipe) -> int:
    return recipe.source(STAGES[2 if recipe.base.stage_2 else 1]).picture_size_px
