"""Short names: of the fields that a sweep varies, of its runs, and of adapter scales."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from finetune.sweeping.axes import Combination

LONGEST = 100
"""The most characters of a run's name, which is that of its folder."""


def shorten_keys(axes: Sequence[Sequence[str]]) -> list[str]:
    """Name axes by the ends of their keys, no longer than tells them apart.

    Args:
        axes: the dotted keys of each axis; only their common end counts if they have one.

    Example:
        >>> shorten_keys([["stage_1.adapter.rank"], ["stage_1.optimizer.learning_rate"]])
        ['rank', 'learning_rate']
        >>> shorten_keys([["stage_1.steps"], ["stage_2.steps"]])
        ['stage_1.steps', 'stage_2.steps']
        >>> shorten_keys([["stage_1.adapter.rank", "stage_2.adapter.rank"]])
        ['rank']
    """
    paths = [_find_common_end(keys) for keys in axes]
    names = []
    for index, path in enumerate(paths):
        others = paths[:index] + paths[index + 1 :]
        lengths = range(1, len(path) + 1)
        telling = (n for n in lengths if all(path[-n:] != other[-n:] for other in others))
        names.append(".".join(path[-next(telling, len(path)) :]))
    return names


def _find_common_end(keys: Sequence[str]) -> list[str]:
    """Find the parts that all dotted keys end in; those of the first key if there are none."""
    first, *others = [key.split(".")[::-1] for key in keys]
    length = 0
    while length < len(first) and all(
        other[: length + 1] == first[: length + 1] for other in others
    ):
        length += 1
    return first[: length or None][::-1]


def name_runs(labels: Sequence[str], runs: Sequence[tuple[Combination, int | None]]) -> list[str]:
    """Name runs after their values and seeds: ``rank-8_learning_rate-1e-3_seed-0``.

    A name depends on the run alone, except that names which would be equal, or too long for a
    folder, end in a hash of the values.

    Args:
        labels: the names of the axes.
        runs: each run's values and its seed; ``None``: the recipe's.
    """
    plain = [_name(labels, values, seed) for values, seed in runs]
    counts = Counter(plain)
    return [
        f"{name[: LONGEST - 9]}-{_hash(labels, *run)}"
        if counts[name] > 1 or len(name) > LONGEST
        else name
        for name, run in zip(plain, runs, strict=True)
    ]


def name_variant(scale: float) -> str:
    """Name the variant of an adapter scale, apart from every other scale, so that it is read back.

    Example:
        >>> name_variant(0.7), name_variant(1.0), name_variant(0.70000001)
        ('0.7', '1', '0.70000001')
    """
    return repr(float(scale) + 0.0).removesuffix(".0")  # -0.0 + 0.0 is 0.0


def _name(labels: Sequence[str], values: Combination, seed: int | None) -> str:
    parts = [f"{label}-{_slug(value)}" for label, value in zip(labels, values, strict=True)]
    parts += [] if seed is None else [f"seed-{seed}"]
    return "_".join(parts) or "as_given"


def _slug(text: str) -> str:
    """Replace what a folder's name should not hold."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.") or "empty"


def _hash(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:8]
