"""Aligned text for the terminal."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from textwrap import fill

WIDTH = 100
"""The most characters of a line in the terminal, where that is possible."""


def format_table(rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Align rows in columns, two spaces apart, the first ``left`` ones flush left.

    Rows may be shorter than others, and cells may have several lines.
    """
    rows = [line for row in rows for line in _split_lines(row)]
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    sides = [str.ljust] * left + [str.rjust] * len(widths)
    return "\n".join(
        "  ".join(
            side(text, width) for side, text, width in zip(sides, row, widths, strict=False)
        ).rstrip()
        for row in rows
    )


def _split_lines(row: Sequence[str]) -> list[tuple[str, ...]]:
    """Split a row into the lines of its cells; cells with fewer end in empty ones."""
    return list(zip_longest(*(cell.split("\n") for cell in row), fillvalue="")) or [()]


def fill_lines(text: str) -> str:
    """Break a text into lines of at most :data:`WIDTH` characters."""
    return fill(text, WIDTH, break_on_hyphens=False)


def format_facts(facts: Sequence[tuple[str, str]]) -> str:
    """List names with their texts, aligned in one column; empty texts are left out."""
    width = max(len(name) for name, _ in facts) + 2
    return "\n".join(
        name.ljust(width) + text.replace("\n", f"\n{' ' * width}") for name, text in facts if text
    )


def format_range(values: Iterable[float | None]) -> str:
    """Format the smallest and the largest value, ``4`` or ``2 to 16``; empty without values."""
    found = sorted(value for value in values if value is not None)
    ends = dict.fromkeys(f"{value:g}" for value in found[:1] + found[-1:])
    return " to ".join(ends)
