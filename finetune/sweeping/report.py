"""The report of a sweep: one self-contained page, and the same tables as text and as Markdown."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from html import escape
from itertools import islice
from pathlib import Path

from adapters.errors import UserError
from adapters.pictures.reading import read_picture
from finetune.evaluation import page
from finetune.evaluation.drawing import Group, list_shots, rows
from finetune.evaluation.page import embed_picture
from finetune.recipe.schema import Recipe
from finetune.sweeping.judgement import CONFIDENCE, FEWEST, describe_outcome, recommend
from finetune.sweeping.names import name_variant
from finetune.sweeping.outcomes import Outcome, Outcomes, compute_figures
from finetune.sweeping.plot import draw_plot
from finetune.sweeping.scoring import BASE, base_folder, list_files, pictures_folder
from finetune.sweeping.tables import list_tables
from finetune.sweeping.work import Result

SHOWN: dict[Group, int] = {"subject": 6, "others": 2}
"""The most pictures shown of a run, by group of prompts."""

STRIP_PX = 144
"""The side of these pictures, in pixels."""


def write_page(title: str, outcomes: Outcomes) -> str:
    """Write the page: the recommendation, the plot, the tables, and the front's pictures."""
    own = Path(__file__).with_name("sweep.css")
    style = "".join(
        file.read_text(encoding="utf-8")
        for file in (Path(page.__file__).with_name("report.css"), own)
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>\n{style}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(describe_progress(outcomes))}</p>',
        f"<p><b>{escape(recommend(outcomes))}</b></p>",
        draw_plot(outcomes, describe_axes(outcomes)),
        f'<p class="faint">{escape(explain(outcomes))}</p>',
        *(line for table in list_tables(outcomes) for line in table.as_html()),
        "<h2>Pictures of the Pareto front</h2>",
        *_pictures(outcomes),
        *_failures(outcomes),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def write_markdown(title: str, command: str, outcomes: Outcomes) -> str:
    """Write the tables in Markdown, with the command and what the figures are."""
    tables = (table.as_markdown() for table in list_tables(outcomes))
    about = (describe_progress(outcomes), explain(outcomes))
    parts = [f"## {title}", *about, f"```bash\n{command}\n```", *tables, recommend(outcomes)]
    return "\n\n".join(filter(None, parts)) + "\n"


def write_text_report(outcomes: Outcomes) -> str:
    """Write the tables for the terminal, and the recommendation."""
    tables = (table.as_text() for table in list_tables(outcomes))
    return "\n\n".join(filter(None, (*tables, recommend(outcomes))))


def describe_progress(outcomes: Outcomes) -> str:
    """Say how much of a sweep is done."""
    done = len(outcomes.base().runs)
    return (
        f"{done} of {outcomes.total} runs scored; {len(outcomes.rows)} outcomes,"
        f" {len(outcomes.front)} on the Pareto front (*): no other has more of both scores."
    )


def describe_axes(outcomes: Outcomes) -> tuple[str, str]:
    """Say what fidelity and preservation are: the former depends on whether a ceiling is known."""
    known = any(
        (run.scores["ceiling"].get("clip_i") or {}).get("value") is not None
        for run in outcomes.base().runs
    )
    fidelity = "CLIP-I as a part of its ceiling" if known else "CLIP-I"
    return f"Fidelity: {fidelity}", "Preservation: others' CLIP-T as a part of the base's"


def explain(outcomes: Outcomes) -> str:
    """Explain the figures of the tables."""
    apart = " ".join(f"Each {axis} is compared with its own base." for axis in outcomes.across)
    sentences = [
        f"{'. '.join(describe_axes(outcomes))}.",
        "A scale is the adapter's: the same training, drawn with less or more of it.",
        f"Scores are means over the runs, ± the standard error. {apart}".strip(),
        f"Differences have {CONFIDENCE:.0%} intervals by bootstrap over {FEWEST} pairs or more,"
        " which say how the means would vary with other seeds; one in twenty leaves out zero by"
        " chance.",
    ]
    return " ".join(sentences)


def _pictures(outcomes: Outcomes) -> Iterator[str]:
    """Show the base's pictures, and those of each outcome on the front."""
    if outcomes.front:
        yield '<section class="row"><h3>The base</h3>'
        yield from _strips(outcomes.base(), base_folder)
        yield "</section>"
    for index in outcomes.front:
        row = outcomes.rows[index]
        first = row.runs[0].point
        scores = ", ".join(f"{name} {row.scores[name]}" for name in ("fidelity", "preservation"))
        yield f'<section class="row"><h3>{index + 1}: {escape(describe_outcome(row))}</h3>'
        yield f"<div>{escape(scores)}</div>"
        yield from _strips(row, partial(pictures_folder, scale=row.scale))
        yield f"<code>{escape(str(first.adapters))}={name_variant(row.scale)}</code></section>"


def _strips(row: Outcome, find_folder: Callable[[Recipe], Path]) -> Iterator[str]:
    """Show pictures of the first run of each subject, or of whatever scores are averaged across."""
    shown: dict[tuple[str, ...], Result] = {}
    for run in row.runs:
        shown.setdefault(tuple(run.point.across.values()), run)
    for values, run in shown.items():
        figures = compute_figures(run.scores, row.variant)
        scores = ", ".join(
            f"{name} {'-' if (value := figures[name]) is None else f'{value:.3f}'}"
            for name in ("fidelity", "preservation")
        )
        seed = "" if row.variant == BASE else f"seed {run.point.seed}"
        about = ", ".join(filter(None, (*values, seed, scores)))
        yield f'<p class="faint">{escape(about)}</p>'
        yield from _strip(run.point.recipe, find_folder(run.point.recipe))


def _strip(recipe: Recipe, folder: Path) -> Iterator[str]:
    """Show some of the pictures that were drawn into a folder, without those that are damaged."""
    assert recipe.evaluation is not None
    shots = list_shots(recipe.evaluation)
    files = list_files(folder, len(shots))
    yield '<div class="strip">'
    for group, most in SHOWN.items():
        for row in islice(rows(shots, group), most):
            with suppress(UserError):
                source = embed_picture(read_picture(files[row]), STRIP_PX)
                text = escape(shots[row].prompt)
                yield f'<figure><img src="{source}" alt="{text}" loading="lazy">'
                yield f"<figcaption>{text}</figcaption></figure>"
    yield "</div>"


def _failures(outcomes: Outcomes) -> Iterator[str]:
    if outcomes.failures:
        yield "<h2>Failed runs</h2>"
    for failed in outcomes.failures:
        reason = f'<span class="bad">{escape(failed.failure or "")}</span>'
        yield f"<p><b>{escape(failed.point.name)}</b> {reason}</p>"
