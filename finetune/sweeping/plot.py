"""The picture of a sweep: fidelity against preservation, as SVG to stand in a page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from finetune.sweeping.judgement import describe_outcome
from finetune.sweeping.outcomes import Outcome, Outcomes, Spread

WIDTH, HEIGHT = 800, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 44, 65
"""The margins around the plot, for tick labels and axis titles."""

RADIUS = 6

LABEL_PX = 20
"""The distance below which two marks share a label."""

TICKS = 5
"""The number of ticks that an axis should have, about."""

STEPS = (1, 2, 2.5, 5, 10)
"""The distances between ticks that read well, times a power of ten."""


class Scale:
    """A linear map from scores to places along an axis, whose ends are ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        span = high - low or 0.1
        power = 10 ** math.floor(math.log10(span / TICKS))
        step = next(s * power for s in STEPS if s * power >= span / TICKS)
        first, last = math.floor(low / step), math.ceil(high / step)
        last = max(last, first + 1)
        self.ticks = [round(n * step, 10) for n in range(first, last + 1)]
        """The scores with a label."""
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        """Return the place of a score in px."""
        low, high = self.ticks[0], self.ticks[-1]
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def draw_plot(outcomes: Outcomes, titles: tuple[str, str]) -> str:
    """Draw all outcomes that have both scores, with standard errors, the Pareto front and the base.

    Args:
        outcomes: the outcomes; numbers at the points are those of the rows, from 1.
        titles: what the scores are, of fidelity (upwards) and preservation (to the right).
    """
    places = {index: find_place(row) for index, row in enumerate(outcomes.rows)}
    known = {index: place for index, place in places.items() if place is not None}
    if not known:
        return '<p class="faint">No run has both scores yet.</p>'
    base = find_place(outcomes.base())
    sides, heights = zip(*known.values(), strict=True)
    shares, fidelities = (
        [end for each in spreads for end in find_ends(each)] for spreads in (sides, heights)
    )
    if base is not None:
        shares.append(base[0].mean)
        if is_near(base[1].mean, fidelities):
            fidelities.append(base[1].mean)
    across = Scale(shares, LEFT, WIDTH - RIGHT)
    up = Scale(fidelities, HEIGHT - BOTTOM, TOP)
    lines = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{escape(titles[0])} against {escape(titles[1])}">',
        *_axes(across, up, titles),
        _stairs([known[index] for index in outcomes.front], across, up),
        *([] if base is None else _base(*base, across, up)),
    ]
    # the front is drawn last, above the others
    for index in sorted(known, key=lambda index: index in outcomes.front):
        x, y = known[index]
        about = escape(describe_outcome(outcomes.rows[index]))
        lines += [
            f'<g class="{"front" if index in outcomes.front else "other"}">',
            f"<title>{index + 1}: {about}&#10;"
            f"{escape(titles[0])} {y}&#10;{escape(titles[1])} {x}</title>",
            *_point(x, y, across, up),
            "</g>",
        ]
    marks = {index: (across(x.mean), up(y.mean)) for index, (x, y) in known.items()}
    for indices in gather_close(marks):
        x_px, y_px = marks[indices[0]]
        kind = "front" if set(indices) & set(outcomes.front) else "other"
        numbers = ", ".join(str(index + 1) for index in sorted(indices))
        lines.append(f'<text class="{kind}" x="{x_px + 9}" y="{y_px - 8}">{numbers}</text>')
    return "\n".join([*lines, "</svg>"])


def _axes(across: Scale, up: Scale, titles: tuple[str, str]) -> Iterator[str]:
    for tick in across.ticks:
        x = across(tick)
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        yield f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:g}</text>'
    for tick in up.ticks:
        y = up(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>'
    yield (
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">'
        f"{escape(titles[1])} →</text>"
    )
    yield f'<text class="axis" x="8" y="20">↑ {escape(titles[0])}</text>'


def find_place(row: Outcome) -> tuple[Spread, Spread] | None:
    """Return an outcome's preservation and fidelity; ``None``: one is undefined."""
    x, y = row.scores.get("preservation"), row.scores.get("fidelity")
    return None if x is None or y is None else (x, y)


def find_ends(spread: Spread) -> tuple[float, float]:
    """Return the ends of a score's bar, one standard error from its mean."""
    error = spread.error or 0.0
    return spread.mean - error, spread.mean + error


def is_near(value: float, others: Sequence[float]) -> bool:
    """Tell whether a score is as near to others as they are to each other, to share their axis."""
    low, high = min(others), max(others)
    return low - value <= high - low


def _point(x: Spread, y: Spread, across: Scale, up: Scale) -> Iterator[str]:
    """Draw the mean, and its standard errors through it."""
    middle_x, middle_y = across(x.mean), up(y.mean)
    (left, right), (bottom, top) = find_ends(x), find_ends(y)
    for x1, x2, y1, y2 in (
        (across(left), across(right), middle_y, middle_y),
        (middle_x, middle_x, up(bottom), up(top)),
    ):
        if (x1, y1) != (x2, y2):
            yield f'<line class="range" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'
    yield f'<circle cx="{middle_x}" cy="{middle_y}" r="{RADIUS}"/>'


def _base(x: Spread, y: Spread, across: Scale, up: Scale) -> Iterator[str]:
    """Draw the base, which has forgotten nothing; at the lower edge if it is far below the rest."""
    place, below = across(x.mean), y.mean < up.ticks[0]
    height = HEIGHT - BOTTOM if below else up(y.mean)
    yield f'<line class="base" x1="{place}" x2="{place}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    yield f'<circle class="base" cx="{place}" cy="{height}" r="{RADIUS}"/>'
    yield (
        f'<text class="base" x="{place - 10}" y="{height - 9}" text-anchor="end">'
        f"base{f' {y.mean:.3f} ↓' if below else ''}</text>"
    )


def _stairs(front: Sequence[tuple[Spread, Spread]], across: Scale, up: Scale) -> str:
    """Draw the border of all that some point on the front beats, from high fidelity to low."""
    if not front:
        return ""
    path = f"M{LEFT} {up(front[0][1].mean)}"
    for x, y in front:
        path += f" V{up(y.mean)} H{across(x.mean)}"
    return f'<path class="stairs" d="{path} V{HEIGHT - BOTTOM}"/>'


def gather_close(marks: Mapping[int, tuple[float, float]]) -> list[list[int]]:
    """Group marks that are too close for a label each; the first of a group carries its label."""
    groups: list[list[int]] = []
    for index, place in marks.items():
        near = (group for group in groups if math.dist(marks[group[0]], place) < LABEL_PX)
        if group := next(near, None):
            group.append(index)
        else:
            groups.append([index])
    return groups
