"""The losses of training pictures one by one: which picture is learnt least."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from finetune.data.pictures import Picture


def name_pictures(pictures: Sequence[Picture]) -> list[str]:
    """Name pictures by their files; those that share a name also by their place."""
    names = [Path(picture.source).name for picture in pictures]
    return [
        name if names.count(name) == 1 else f"{index:02d} {name}"
        for index, name in enumerate(names)
    ]


def tabulate_losses(names: Sequence[str], first: Sequence[float], now: Sequence[float]) -> str:
    """List pictures' losses in Markdown, the worst first, and name the worst.

    A busy picture has a high loss from the start, so the order is by what is left of it: the
    picture that is learnt least stands first.
    """
    left = {name: _part_left(old, new) for name, old, new in zip(names, first, now, strict=True)}
    losses = dict(zip(names, zip(first, now, strict=True), strict=True))
    worst, *others = sorted(left, key=lambda name: -left[name])
    lines = ["| picture | loss | at first | left |", "|---|---|---|---|"]
    for name in (worst, *others):
        old, new = losses[name]
        lines.append(f"| {name} | {new:.4f} | {old:.4f} | {_percent(left[name])} |")
    peers = median(left[name] for name in others) if others else math.inf
    if left[worst] > peers:
        share, rest = _percent(left[worst]), _percent(peers)
        compared = f"the others have {rest} (median)" if others[1:] else f"the other has {rest}"
        lines += ["", f"Learnt least: {worst}, with {share} of its loss left; {compared}."]
    return "\n".join(lines)


def _part_left(first: float, now: float) -> float:
    """Return the part of a loss that is left: infinite if there was none at first."""
    if first == 0:
        return math.inf if now > 0 else 0.0
    return now / first


def _percent(part: float) -> str:
    return "∞" if math.isinf(part) else f"{part:.0%}"
