"""The tables of a sweep: its outcomes, their differences, and both by subject."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from adapters.tables import format_table
from finetune.sweeping.judgement import COMPARED, compare_all, count_higher, describe
from finetune.sweeping.names import name_variant
from finetune.sweeping.outcomes import Outcome, Outcomes, Spread
from finetune.sweeping.scoring import BASE

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


@dataclass(frozen=True)
class Table:
    """A table that is written in several formats."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    raised: frozenset[int] = frozenset()
    """The rows that stand out on the page."""
    colours: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """The style classes of cells on the page, by row and column."""

    def as_text(self) -> str:
        """Write it for the terminal."""
        return f"{self.title}\n{format_table([self.head, *self.rows])}"

    def as_markdown(self) -> str:
        """Write it in Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        texts = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
        return "\n".join([f"{self.title}:", "", *(f"| {text} |" for text in texts)])

    def as_html(self) -> Iterator[str]:
        """Write it for the page."""
        yield f"<h2>{escape(self.title)}</h2>"
        yield '<div class="scroll"><table><thead><tr>'
        yield "".join(f"<th>{escape(text)}</th>" for text in self.head)
        yield "</tr></thead><tbody>"
        for number, row in enumerate(self.rows):
            front = ' class="front"' if number in self.raised else ""
            colours = (self.colours.get((number, place), "") for place in range(len(row)))
            cells = (
                f'<td class="{colour}">{escape(text)}</td>'
                if colour
                else f"<td>{escape(text)}</td>"
                for text, colour in zip(row, colours, strict=True)
            )
            yield f"<tr{front}>{''.join(cells)}</tr>"
        yield "</tbody></table></div>"


def list_tables(outcomes: Outcomes) -> list[Table]:
    """List the tables of what has been scored so far."""
    if not outcomes.rows:
        return [Table("Outcomes", ("", "scale"), ())]
    differences = [tabulate_differences(outcomes)] if compare_all(outcomes) else []
    by_value = [tabulate_across(outcomes, axis) for axis in outcomes.across]
    return [tabulate_outcomes(outcomes), *differences, *by_value]


def tabulate_outcomes(outcomes: Outcomes) -> Table:
    """Tabulate each outcome's scores over its runs: the front first, then the others, the base."""
    names = list(outcomes.rows[0].settings)
    scores = [name for name in TITLES if any(row.scores.get(name) for row in outcomes.rows)]
    order, base = order_rows(outcomes), outcomes.base().scores
    rows = [
        (
            _number(outcomes, index),
            *_values(outcomes.rows[index]),
            str(len(outcomes.rows[index].runs)),
            *(_format(outcomes.rows[index].scores.get(name)) for name in scores),
            format_seconds(outcomes.rows[index].seconds),
        )
        for index in order
    ]
    last = (BASE, *[""] * (len(names) + 2), *(_format(base.get(name)) for name in scores), "")
    return Table(
        "Outcomes",
        ("", *names, "scale", "runs", *(TITLES[name] for name in scores), "training"),
        (*rows, last),
        raised=frozenset(range(len(outcomes.front))),
    )


def tabulate_differences(outcomes: Outcomes) -> Table:
    """Tabulate the differences from the reference, of pairs of the same subject and seed."""
    assert outcomes.reference is not None
    reference, differences = outcomes.rows[outcomes.reference], compare_all(outcomes)
    rows, colours = [], {}
    shown = [index for index in order_rows(outcomes) if differences.get(index)]
    for number, index in enumerate(shown):
        row, found = outcomes.rows[index], differences[index]
        before = (_number(outcomes, index), *_values(row))
        for place, name in enumerate(COMPARED, len(before)):
            if name in found:
                colours[number, place] = {1: "good", -1: "bad", 0: ""}[found[name].sign]
        pairs = str(max(each.pairs for each in found.values()))
        agreeing = (
            f"{count_higher(row, reference, axis, values)} of {len(values)}"
            for axis, values in outcomes.across.items()
        )
        texts = (str(found[name]) if name in found else "-" for name in COMPARED)
        rows.append((*before, *texts, pairs, *agreeing))
    title = f"Differences from {describe(outcomes, outcomes.reference)}, of pairs of the same seed"
    return Table(
        title + "".join(f" and {axis}" for axis in outcomes.across),
        (
            *("", *reference.settings, "scale", *COMPARED, "pairs"),
            *(f"higher fidelity by {axis}" for axis in outcomes.across),
        ),
        rows,
        colours=colours,
    )


def tabulate_across(outcomes: Outcomes, axis: str) -> Table:
    """Tabulate fidelity and preservation by the values of an axis, and the base's."""
    values, names = outcomes.across[axis], list(outcomes.rows[0].settings)
    rows = [
        (
            _number(outcomes, index),
            *_values(row := outcomes.rows[index]),
            *(_format_place(row.select(axis, value)) for value in values),
        )
        for index in order_rows(outcomes)
    ]
    base = outcomes.base()
    floors = (_format_place(base.select(axis, value)) for value in values)
    return Table(
        f"Fidelity and preservation by {axis}",
        ("", *names, "scale", *values),
        (*rows, (BASE, *[""] * len(names), "", *floors)),
        raised=frozenset(range(len(outcomes.front))),
    )


def order_rows(outcomes: Outcomes) -> list[int]:
    """Order the rows: the front, then the others by fidelity."""
    others = [index for index in range(len(outcomes.rows)) if index not in outcomes.front]

    def fall(index: int) -> float:
        fidelity = outcomes.rows[index].place[0]
        return float("inf") if fidelity is None else -fidelity

    return [*outcomes.front, *sorted(others, key=fall)]


def _number(outcomes: Outcomes, index: int) -> str:
    """Number a row from 1, with a star if it is on the front."""
    return f"{index + 1}{' *' if index in outcomes.front else ''}"


def _values(row: Outcome) -> tuple[str, ...]:
    return (*row.settings.values(), name_variant(row.scale))


def _format(spread: Spread | None) -> str:
    return "-" if spread is None else str(spread)


def _format_place(row: Outcome) -> str:
    return ", ".join("-" if score is None else f"{score:.3f}" for score in row.place)


def format_seconds(spread: Spread | None) -> str:
    """Format the mean time of a training, such as ``4:05``."""
    if spread is None:
        return ""
    minutes, seconds = divmod(round(spread.mean), 60)
    return f"{minutes}:{seconds:02d}"
