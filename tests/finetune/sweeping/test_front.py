"""The Pareto front against its definition."""

import math
import random

from finetune.sweeping.front import find_front

Place = tuple[float | None, float | None]


def search_front(points: list[Place]) -> set[int]:
    """All points that no other one beats, by the definition."""

    def beats(one: Place, other: Place) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)  # type: ignore[operator]

    valid = [
        index
        for index, place in enumerate(points)
        if all(score is not None and math.isfinite(score) for score in place)
    ]
    return {i for i in valid if not any(beats(points[j], points[i]) for j in valid)}


def test_the_front_is_what_no_point_beats() -> None:
    rng = random.Random(0)
    scores: list[float | None] = [*(n / 4 for n in range(5)), None, math.nan, math.inf, -math.inf]
    weights = [5] * 5 + [1] * 4  # few different scores: ties and duplicates are common
    for _ in range(500):
        points: list[Place] = [
            (rng.choices(scores, weights)[0], rng.choices(scores, weights)[0])
            for _ in range(rng.randrange(12))
        ]
        front = find_front(points)
        assert len(front) == len(set(front))
        assert set(front) == search_front(points)
        fidelity = [points[index][0] for index in front]
        assert fidelity == sorted(fidelity, key=lambda score: -(score or 0))


def test_ties() -> None:
    assert find_front([]) == []
    assert find_front([(1, 1), (1, 1)]) == [0, 1]
    assert find_front([(1, 0), (1, 1), (0, 1)]) == [1]
    assert find_front([(None, 1), (1, math.nan)]) == []
    assert find_front([(1, 0), (0, 1)]) == [0, 1]
