"""The Pareto front: the points that no other point beats in both scores."""

import math
from collections.abc import Sequence


def find_front(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """Find the points on the Pareto front, where more is better in both scores.

    A point is on it if no other is at least as good in both scores and better in one; equal points
    are on it together. Points with a score that is undefined or not finite are never on it.

    Returns:
        Their indices, from the largest first score to the smallest.
    """
    finite = {
        index: (first, second)
        for index, (first, second) in enumerate(points)
        if first is not None and second is not None and math.isfinite(first + second)
    }
    # in this order a point can be beaten only by earlier ones, so the best second score decides
    order = sorted(finite, key=lambda index: (*(-score for score in finite[index]), index))
    front: list[int] = []
    for index in order:
        if (
            not front
            or finite[index][1] > finite[front[-1]][1]
            or (finite[index] == finite[front[-1]])
        ):
            front.append(index)
    return front
