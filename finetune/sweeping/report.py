"""The report of a sweep: one self-contained page, and a table for the terminal."""

from collections.abc import Iterator
from contextlib import suppress
from html import escape
from itertools import islice
from pathlib import Path

from adapters.errors import UserError
from adapters.pictures.reading import read_picture
from adapters.tables import format_table
from finetune.evaluation import page
from finetune.evaluation.drawing import Group, list_shots, rows
from finetune.evaluation.page import embed_picture
from finetune.recipe.schema import Recipe
from finetune.sweeping.names import name_variant
from finetune.sweeping.outcomes import Outcome, Outcomes, Spread
from finetune.sweeping.plot import draw_plot
from finetune.sweeping.scoring import (
    BASE,
    base_folder,
    list_files,
    pictures_folder,
)

SHOWN: dict[Group, int] = {"subject": 6, "others": 2}
"""The most pictures shown of an outcome, by group of prompts."""

STRIP_PX = 120
"""The side of these pictures, in pixels."""

TITLES = {
    "fidelity": "fidelity",
    "preservation": "preservation",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "clip_t": "CLIP-T",
    "clip_t_others": "CLIP-T of others",
    "div": "DIV",
    "pres": "PRES",
}
"""The titles of scores, in their order; scores without one are in results.json alone."""


def describe_axes(outcomes: Outcomes) -> tuple[str, str]:
    """Say what fidelity and preservation are: the former depends on whether a ceiling is known."""
    known = any(
        (run.scores["ceiling"].get("clip_i") or {}).get("value") is not None
        for row in outcomes.rows
        for run in row.runs
    )
    fidelity = "CLIP-I as a part of its ceiling" if known else "CLIP-I"
    return f"Fidelity: {fidelity}", "Preservation: others' CLIP-T as a part of the base's"


def write_page(title: str, outcomes: Outcomes) -> str:
    """Write the page: the plot, the front with its pictures, and all outcomes."""
    own = Path(__file__).with_name("sweep.css")
    style = "".join(
        file.read_text(encoding="utf-8")
        for file in (Path(page.__file__).with_name("report.css"), own)
    )
    titles = describe_axes(outcomes)
    done = sum(len({run.point.name for run in row.runs}) for row in outcomes.rows)
    scales = len({row.scale for row in outcomes.rows}) or 1
    about = (
        f"{done // scales} of {outcomes.total} runs scored; {len(outcomes.rows)} outcomes,"
        f" {len(outcomes.front)} on the Pareto front: no other has more of both scores."
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>\n{style}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(about)}</p>',
        draw_plot(outcomes, titles),
        f'<p class="faint">{escape(". ".join(titles))}. A scale is the adapter\'s: the same'
        " training, drawn with less or more of it. Points are means over the seeds, and lines their"
        " ranges.</p>",
        "<h2>The Pareto front</h2>",
        *_base_strip(outcomes),
        *(part for index in outcomes.front for part in _best(index, outcomes.rows[index])),
        "<h2>All outcomes</h2>",
        *_table(outcomes),
        *_tables_across(outcomes),
        *_failures(outcomes),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _base_strip(outcomes: Outcomes) -> Iterator[str]:
    if outcomes.front:
        yield '<section class="row"><h3>The base</h3>'
        recipe = outcomes.rows[outcomes.front[0]].runs[0].point.recipe
        yield from _strip(recipe, base_folder(recipe))
        yield "</section>"


def _best(index: int, row: Outcome) -> Iterator[str]:
    """Show an outcome on the front: its values, scores, pictures and adapters."""
    first = row.runs[0].point
    scores = ", ".join(f"{name} {row.scores[name]}" for name in ("fidelity", "preservation"))
    yield f'<section class="row"><h3>{index + 1}: {escape(describe_outcome(row))}</h3>'
    yield f"<div>{escape(scores)}</div>"
    yield from _strip(first.recipe, pictures_folder(first.recipe, row.scale))
    yield f"<code>{escape(str(first.adapters))}={name_variant(row.scale)}</code></section>"


def describe_outcome(row: Outcome) -> str:
    """Describe an outcome by its values and its scale."""
    values = [f"{name} {value}" for name, value in row.settings.items()]
    return ", ".join([*values, f"scale {name_variant(row.scale)}"])


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
                yield f'<img src="{source}" alt="{text}" title="{text}" loading="lazy">'
    yield "</div>"


def _table(outcomes: Outcomes) -> Iterator[str]:
    names, scores = _columns(outcomes)
    heads = ["", *names, "scale", *(TITLES[name] for name in scores), "training"]
    yield '<div class="scroll"><table><thead><tr>'
    yield "".join(f"<th>{escape(head)}</th>" for head in heads)
    yield "</tr></thead><tbody>"
    for index in _order(outcomes):
        row = outcomes.rows[index]
        cells = [str(index + 1), *map(escape, row.settings.values()), name_variant(row.scale)]
        cells += [_cell(row.scores.get(name)) for name in scores]
        cells += [format_seconds(row.seconds)]
        front = ' class="front"' if index in outcomes.front else ""
        yield f"<tr{front}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    if outcomes.rows:
        figures = outcomes.base().scores
        cells = ["base", *[""] * len(names), "", *(_cell(figures.get(n)) for n in scores), ""]
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</tbody></table></div>"


def _tables_across(outcomes: Outcomes) -> Iterator[str]:
    """Show fidelity and preservation for each value that the sweep averages across."""
    for axis in outcomes.across:
        head, *rows = list_across(outcomes, axis)
        yield f"<h2>By {escape(axis)}: fidelity, preservation</h2>"
        yield '<div class="scroll"><table><thead><tr>'
        yield "".join(f"<th>{escape(text)}</th>" for text in head)
        yield "</tr></thead><tbody>"
        for row in rows:
            yield "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>"
        yield "</tbody></table></div>"


def list_across(outcomes: Outcomes, axis: str) -> Iterator[tuple[str, ...]]:
    """List each outcome's fidelity and preservation by the values of an axis, and the base's."""
    values, names = outcomes.across[axis], _columns(outcomes)[0]
    yield ("", *names, "scale", *values)
    for index in _order(outcomes):
        row = outcomes.rows[index]
        cells = (_format_place(row.select(axis, value)) for value in values)
        yield (str(index + 1), *row.settings.values(), name_variant(row.scale), *cells)
    base = outcomes.base()
    yield (BASE, *[""] * len(names), "", *(_format_place(base.select(axis, v)) for v in values))


def _format_place(row: Outcome) -> str:
    return ", ".join("-" if score is None else f"{score:.3f}" for score in row.place)


def _cell(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    text = f"{spread.mean:.3f}"
    if spread.low == spread.high:
        return text
    return f"{text}<small>{spread.low:.3f} to {spread.high:.3f}</small>"


def _failures(outcomes: Outcomes) -> Iterator[str]:
    if outcomes.failures:
        yield "<h2>Failed runs</h2>"
    for failed in outcomes.failures:
        reason = f'<span class="bad">{escape(failed.failure or "")}</span>'
        yield f"<p><b>{escape(failed.point.name)}</b> {reason}</p>"


def write_table(outcomes: Outcomes) -> str:
    """Lay the outcomes out for the terminal, the front first and marked."""
    names, scores = _columns(outcomes)
    rows = [("", *names, "scale", *(TITLES[name] for name in scores), "training")]
    for index in _order(outcomes):
        row = outcomes.rows[index]
        rows.append(
            (
                f"{index + 1}{' *' if index in outcomes.front else ''}",
                *row.settings.values(),
                name_variant(row.scale),
                *("-" if (s := row.scores.get(name)) is None else str(s) for name in scores),
                format_seconds(row.seconds),
            )
        )
    tables = [format_table(rows)]
    for axis in outcomes.across:
        about = f"By {axis}: fidelity, preservation"
        tables.append(f"{about}\n{format_table(list_across(outcomes, axis))}")
    return "\n\n".join(tables)


def _columns(outcomes: Outcomes) -> tuple[list[str], list[str]]:
    """List the names of the varied values, and of the scores that any run has."""
    names = list(outcomes.rows[0].settings) if outcomes.rows else []
    return names, [name for name in TITLES if any(row.scores.get(name) for row in outcomes.rows)]


def _order(outcomes: Outcomes) -> list[int]:
    """Order the rows: the front, then the others by fidelity."""
    others = [index for index in range(len(outcomes.rows)) if index not in outcomes.front]

    def fall(index: int) -> float:
        fidelity = outcomes.rows[index].place[0]
        return float("inf") if fidelity is None else -fidelity

    return [*outcomes.front, *sorted(others, key=fall)]


def format_seconds(spread: Spread | None) -> str:
    """Format the mean time of a training, such as ``4:05``."""
    if spread is None:
        return ""
    minutes, seconds = divmod(round(spread.mean), 60)
    return f"{minutes}:{seconds:02d}"
