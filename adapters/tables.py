"""Tables for the terminal."""

from collections.abc import Iterable, Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is flush left and whose others are flush right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """What there is to say, one row each; a text of several lines stays in its column."""
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(
        name.ljust(width) + text.replace("\n", f"\n{' ' * width}") for name, text in rows if text
    )


def span(values: Iterable[float | None]) -> str:
    """Values in a few words, ``4`` or ``2 to 16``; empty: there are none."""
    found = sorted(value for value in values if value is not None)
    ends = dict.fromkeys(f"{value:g}" for value in found[:1] + found[-1:])
    return " to ".join(ends)
