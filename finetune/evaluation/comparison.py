"""A comparison of the base and the fine-tuned cascade: one picture to look at, and a judgement."""

import math
from collections.abc import Mapping

from PIL import Image

from adapters.atomic import write_png
from adapters.errors import UserError
from adapters.pictures.contact_sheet import contact_sheet
from adapters.tables import fill_lines, format_facts
from finetune.evaluation.drawing import BASE, FINE_TUNED
from finetune.evaluation.intervals import Score
from finetune.evaluation.measurement import evaluate
from finetune.evaluation.report import EvaluationReport
from finetune.evaluation.scoring import TITLES
from finetune.evaluation.verdict import write_verdict
from finetune.recipe.schema import Expected, Recipe
from finetune.run.folders import Folders

JUDGED = ("clip_i", "clip_t", "clip_t_others")
"""The scores that are shown and judged."""

FAR = 3
"""The number of spreads below the expected score at which chance no longer explains the score."""


def compare(recipe: Recipe) -> tuple[str, EvaluationReport]:
    """Evaluate a run, and write ``before_after.png`` next to its report.

    Returns:
        The scores and the verdict as text to print, and the evaluation.

    Raises:
        UserError: as :func:`finetune.evaluation.measurement.evaluate`.
    """
    folders, report = Folders(recipe.folder), evaluate(recipe)
    picture = folders.run / "before_after.png"
    page = report.save(folders.evaluation)
    write_png(picture, before_after(report))
    facts = [
        ("Look at", str(picture)),
        ("Report", str(page)),
        ("Adapters", str(folders.adapters)),
        ("Curves", f".venv/bin/tensorboard --logdir {folders.run / 'logs'}"),
    ]
    parts = report.table(JUDGED, intervals=False), fill_lines(write_verdict(report))
    return "\n\n".join([*parts, format_facts(facts)]) + "\n", report


def before_after(report: EvaluationReport) -> Image.Image:
    """Arrange training pictures and the first picture of each prompt, by both cascades."""
    first = [number for number, shot in enumerate(report.shots) if shot.number == 0]
    drawn = [[report.samples[name][n].final for n in first] for name in (BASE, FINE_TUNED)]
    photos = [photo.image for photo in report.photos[: len(first)]]
    return contact_sheet(
        [photos, *drawn],
        row_captions=["your pictures", "base", "fine-tuned"],
        column_captions=[report.shots[number].prompt for number in first],
        title=f"{report.recipe}: the base, and the fine-tuned cascade",
    )


def judge(scores: Mapping[str, Score | None], expected: Expected) -> str:
    """Say in a sentence how the fine-tuned cascade's scores compare with the expected ones.

    Raises:
        UserError: if a score is far below the expected one.
    """
    # without other prompts, which are optional, there is no score of them
    known = {name for name in JUDGED if name != "clip_t_others" or scores.get(name)}
    shortfalls, sentences = [], []
    for name, wanted in expected.model_dump(include=known, exclude_none=True).items():
        score = scores[name]
        # a score that is undefined or not a number counts as the worst possible
        found = -1.0 if score is None or math.isnan(score.value) else score.value
        shortfalls.append(wanted - found)
        if wanted - found > expected.spread:
            sentences.append(f"{TITLES[name]} is {found:.3f}, expected {wanted:.3f}")
    if not sentences:
        return f"The scores are as expected, to within {expected.spread}.\n"
    if max(shortfalls) > FAR * expected.spread:
        raise UserError(
            f"The run did not learn what it should: {'; '.join(sentences)}. Compare its recipe with"
            " the one that the expected scores come from, and look at its curves."
        )
    return f"Lower than expected: {'; '.join(sentences)}. Another seed may do better.\n"
