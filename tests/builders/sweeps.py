"""Sweeps whose runs are done, without any training: adapters, pictures and scores on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from adapters.files.places import PEFT_WEIGHTS
from finetune.sweeping.outcomes import Outcomes, collect_outcomes
from finetune.sweeping.points import Point, find_reference, plan_points
from finetune.sweeping.progress import add_seconds
from finetune.sweeping.schema import Sweep
from finetune.sweeping.scoring import (
    base_folder,
    list_files,
    pictures_folder,
    read_scores,
    scores_file,
)
from finetune.sweeping.work import Result
from tests.builders.recipes import SMALL, write

EVALUATION = """\
evaluation:
  {prompts: [a <sks> dog], other_prompts: [a cat], identifier: <sks> dog, subject: dog, clip: clip}
"""

CEILING = 0.8

PETS = {"dog": {"evaluation.subject": "dog"}, "cat": {"evaluation.subject": "cat"}}

BASE_OTHERS = {"dog": 0.5, "cat": 0.4}
"""The base's CLIP-T of others, when each subject is trained on."""

SCALES = (0.5, 1.0)


def learn_by_rank(point: Point, scale: float) -> tuple[float, float]:
    """CLIP-I and CLIP-T of others: the higher rank is closer and forgets more."""
    closer = int(point.settings["rank"]) / 32 + point.seed / 100
    return closer * scale, 0.5 - closer * scale / 4


def finish_sweep(
    folder: Path,
    seeds: tuple[int, ...] = (0, 1),
    ceiling: float | None = CEILING,
    across: dict[str, Any] | None = None,
    score: Callable[[Point, float], tuple[float, float]] = learn_by_rank,
) -> list[Point]:
    """Points of three ranks with adapters, pictures and scores."""
    recipe = write(folder, f"{SMALL}runs_dir: {folder / 'runs'}\n{EVALUATION}")
    over = {"stage_1.adapter.rank": [4, 8, 16]}
    sweep = Sweep(recipe=str(recipe), over=over, across=across or {}, seeds=seeds)
    _, points = plan_points(sweep)
    for point in points:
        save_adapter(point, b"adapter")
        others = BASE_OTHERS[point.across.get("pet", "dog")]
        variants = {"base": {"clip_i": {"value": 0.1}, "clip_t_others": {"value": others}}}
        for scale in SCALES:
            clip_i, clip_t_others = score(point, scale)
            variants[f"{scale:g}"] = {
                "clip_i": {"value": clip_i},
                "clip_t_others": {"value": clip_t_others},
            }
            save_picture(pictures_folder(point.recipe, scale))
        save_picture(base_folder(point.recipe))
        scores = read_scores(point.recipe) | {"variants": variants}
        text = json.dumps(scores | {"ceiling": {"clip_i": {"value": ceiling}}})
        scores_file(point.recipe).write_text(text)
        add_seconds(point.recipe, 30.0)
        add_seconds(point.recipe, 35.0)
    return points


def save_adapter(point: Point, content: bytes) -> None:
    file = point.adapters / "stage_1" / PEFT_WEIGHTS
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def save_picture(folder: Path) -> None:
    (file,) = list_files(folder, 1)
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(file)


def collect(points: list[Point], total: int | None = None, **options: Any) -> Outcomes:
    """The outcomes of points, all of them or the first ones of a longer sweep."""
    sweep = Sweep(recipe="recipe.yaml", scales=SCALES)
    results = [Result.read(point) for point in points]
    reference = find_reference(sweep, points)
    return collect_outcomes(results, SCALES, total or len(points), reference, **options)
