"""Score runs of the embedded cascade beside what is true of its world.

    python -m models.truth recipes/quickstart.yaml
    python -m models.truth recipes/quickstart.yaml --pictures drawn --json truth.json
    python -m models.truth runs/quickstart-subjects --json truth.json

Two things are known of this world alone. One is the most that a CLIP score can reach: the score of
true renders of the same captions. The other is the shape that each object should have, about which
the small CLIP is lenient: the SSIM of the real sprite within its outline (`models/shape.py`) is
shown beside what the base reaches on objects that it was trained on.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from adapters.atomic import check_out, write_text
from adapters.errors import UserError, command_line, quiet_libraries
from adapters.tables import format_table
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Evaluation, Recipe
from finetune.step.stages import STAGES
from models.picture_scores import (
    Scores,
    find_subject,
    read_captioned,
    read_drawn,
    render_true,
    score,
    score_shapes,
)
from models.world import SEEN, caption, parse_caption

if TYPE_CHECKING:
    from PIL import Image

    from adapters import Cascade

OWN = SEEN[::12]
"""Objects of all classes that the base was trained on: indices into `world.THINGS`."""
OTHERS = ("pizza",)
"""The objects of the shipped recipes' other prompts that are not in `OWN`."""
DRAWS = 8
"""The number of true renders of each caption."""
ROWS: Mapping[str, tuple[str, str]] = {
    "clip_i": ("CLIP-I, generated to real pictures", "true"),
    "clip_t": ("CLIP-T, picture to prompt", "true"),
    "clip_t_others": ("CLIP-T, prompts of other things", "base"),
    "shape": ("SSIM within the sprite's outline", "own"),
    "shape_others": ("SSIM, prompts of other things", "base"),
}
"""Each score's title, and the column that the fine-tuned cascade's score is a share of."""
COLUMNS: Mapping[str, str] = {
    "base": "base",
    "fine_tuned": "fine-tuned",
    "own": "base, own objects",
    "true": "true renders",
}
"""The columns of the table."""


def measure(
    recipe: Recipe, folder: Path | None = None, images_per_prompt: int = 1
) -> dict[str, Scores]:
    """Score the base, the fine-tuned cascade and true renders.

    Args:
        recipe: a recipe of the embedded cascade with an `evaluation` section.
        folder: captioned pictures to score, a dataset's or of `adapters.generate`; `None`: those
            that the run's adapters draw of the evaluation's prompts.
        images_per_prompt: the number of pictures drawn of each prompt, 1 or more.

    Returns:
        The scores by column of `COLUMNS`. `own` has only `shape`, of the base's pictures of `OWN`
        on the captions' backgrounds.

    Raises:
        UserError: before anything is drawn, if there is no `evaluation` section, no adapter or no
            picture, a prompt is not of this world, none names the subject, or no picture of each
            is asked for.
    """
    from adapters import load_cascade
    from finetune.evaluation.metrics import ClipScorer
    from finetune.run.folders import Folders

    settings, adapters = recipe.evaluation, Folders(recipe.folder).adapters
    if settings is None:
        raise UserError("The recipe needs an evaluation section: prompts, subject and clip.")
    if images_per_prompt < 1:
        raise UserError(f"--images-per-prompt must be 1 or more (got {images_per_prompt}).")
    if folder is None and not adapters.is_dir():
        raise UserError(f"There are no adapters in {adapters}: train the recipe first.")
    size_px = recipe.source(STAGES[2 if recipe.base.stage_2 else 1]).picture_size_px
    given, given_prompts = ([], []) if folder is None else read_drawn(folder, recipe.cache, size_px)
    prompts = list(dict.fromkeys(given_prompts)) or [*settings.prompts, *settings.other_prompts]
    captions = _to_captions(prompts, settings)
    find_subject(captions, settings.subject)
    true = render_true(captions, DRAWS, settings.seed, size_px)  # finds mistakes in captions
    photos, _ = read_captioned(recipe.data, recipe.cache, size_px)
    scorer = ClipScorer(settings.clip)

    places = [place or 0 for _, place in map(parse_caption, captions)]
    own = [caption(thing, place) for thing, place in zip(OWN, cycle(places), strict=False)]
    cascade = load_cascade(
        recipe.base.stage_1,
        recipe.base.stage_2,
        revision=recipe.base.revision,
        variant=recipe.base.variant,
    )
    own_drawn = draw(cascade, recipe, settings, own, 1)
    base = draw(cascade, recipe, settings, prompts, images_per_prompt)
    if folder is None:
        cascade.add_adapter(adapters)
        given = draw(cascade, recipe, settings, prompts, images_per_prompt)
        given_prompts = _repeat(prompts, images_per_prompt)

    def rate(pictures: "Sequence[Image.Image]", captions: Sequence[str]) -> Scores:
        return score(pictures, captions, settings.subject, photos, scorer)

    return {
        "base": rate(base, _repeat(captions, images_per_prompt)),
        "fine_tuned": rate(given, _to_captions(given_prompts, settings)),
        "own": {"shape": fmean(score_shapes(own_drawn, own))},
        "true": rate(true, _repeat(captions, DRAWS)),
    }


def _to_captions(prompts: Sequence[str], settings: Evaluation) -> list[str]:
    """Replace the identifier by the subject's name, as the text score does."""
    return [prompt.replace(settings.identifier, settings.subject) for prompt in prompts]


def _repeat(texts: Sequence[str], count: int) -> list[str]:
    return [text for text in texts for _ in range(count)]


def draw(
    cascade: "Cascade",
    recipe: Recipe,
    settings: Evaluation,
    prompts: Sequence[str],
    images_per_prompt: int,
) -> "list[Image.Image]":
    """Draw prompts as the evaluation does: its seed, its sampling, its prompts of Stage II."""
    stage_2 = dict(zip(settings.prompts, settings.stage_2_prompts or settings.prompts, strict=True))
    images = cascade(
        prompts,
        stage_2_prompt=[stage_2.get(prompt, prompt) for prompt in prompts],
        images_per_prompt=images_per_prompt,
        seed=settings.seed,
        sampling=settings.sampling or recipe.validation.sampling,
        clean_caption=recipe.text.clean_caption,
    )
    return list(images.final)


def compute_shares(scores: Mapping[str, Scores]) -> Scores:
    """Divide the fine-tuned cascade's scores by those that `ROWS` compares them with."""
    return {
        name: found / scores[column][name]
        for name, found in scores["fine_tuned"].items()
        for _, column in (ROWS[name],)
    }


def tabulate(scores: Mapping[str, Scores]) -> str:
    """Lay the scores of all columns out as a table, with the shares."""
    shares = compute_shares(scores)
    rows = [
        (
            title,
            *(f"{scores[key][name]:.3f}" if name in scores[key] else "" for key in COLUMNS),
            f"{shares[name]:.0%} of {COLUMNS[column]}",
        )
        for name, (title, column) in ROWS.items()
        if name in shares
    ]
    return format_table([("", *COLUMNS.values(), "share"), *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m models.truth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="RECIPE [key=value …] | SWEEP",
        help="a YAML file, such as recipes/quickstart.yaml, and values that replace its own; or"
        " folders of sweeps, such as runs/quickstart-subjects, whose runs are all scored",
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="score these instead of the run's"
    )
    parser.add_argument(
        "--images-per-prompt", type=int, default=1, metavar="N", help="(default: 1)"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="for sweeps (default: one for each core)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores here")
    options = parser.parse_intermixed_args(arguments)
    with command_line():
        if options.json is not None:
            check_out(options.json, "file")
        work = score_sweeps if Path(options.sources[0]).is_dir() else score_recipe
        table, everything = work(options)
        if options.json is not None:
            write_text(options.json, json.dumps(everything, indent=2) + "\n")
        sys.stdout.write(f"{table}\n")


def score_recipe(options: argparse.Namespace) -> tuple[str, Any]:
    """Score a recipe's run, and return the table and all figures."""
    recipe = load_recipe(options.sources[0], options.sources[1:])
    quiet_libraries()
    scores = measure(recipe, options.pictures, options.images_per_prompt)
    return tabulate(scores), scores | {"share": compute_shares(scores)}


def score_sweeps(options: argparse.Namespace) -> tuple[str, Any]:
    """Score all runs of some sweeps, and return the tables and all figures.

    Raises:
        UserError: if other options or overrides are given, which are a single recipe's.
    """
    from models.truth_of_sweeps import measure_runs, read_runs
    from models.truth_tables import tabulate_runs, to_json

    if options.pictures is not None or options.images_per_prompt != 1:
        raise UserError("--pictures and --images-per-prompt need a recipe: a sweep has its own.")
    processes = options.processes
    if processes is None:
        processes = len(os.sched_getaffinity(0))
    if processes < 1:
        raise UserError(f"--processes must be 1 or more (got {processes}).")
    runs = [run for folder in options.sources for run in read_runs(Path(folder))]
    scores = measure_runs(runs, processes)
    return tabulate_runs(runs, scores), to_json(runs, scores)


if __name__ == "__main__":
    main()
