"""Learning-rate schedules by name: functions of the step alone."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

Schedule = Callable[[int, int, int], float]
"""A function of a step (from 0), the run's steps and its warm-up steps that returns the ratio of
the learning rate to its peak."""


def _cosine(progress: float) -> float:
    """Fall from 1 to 0 as progress goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _after_warmup(fall: Callable[[float], float]) -> Schedule:
    """Rise linearly from zero in the warm-up, then fall, as ``transformers.get_scheduler`` does."""

    def factor(step: int, steps: int, warmup_steps: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return fall((step - warmup_steps) / max(steps - warmup_steps, 1))

    return factor


ONE_CYCLE_ENDS = 1 / 25, 1e-4
"""The first and last factors of one-cycle: upstream's 4e-6 and 1e-8 for a peak of 1e-4."""

ONE_CYCLE_WARMUP = 0.3
"""The share of one-cycle's steps that is warm-up if the recipe gives none."""


def _one_cycle(step: int, steps: int, warmup_steps: int) -> float:
    """Rise and fall as Torch's ``OneCycleLR``, with the last step of the warm-up at the peak.

    Runs of fewer than four steps start at the peak, since 0.3 of them is less than one step.
    """
    start, end = ONE_CYCLE_ENDS
    peak = max((warmup_steps or ONE_CYCLE_WARMUP * steps) - 1, 0)
    if step < peak:
        return 1 + (start - 1) * _cosine(step / peak)
    return end + (1 - end) * _cosine((step - peak) / max(steps - 1 - peak, 1))


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "constant": _after_warmup(lambda progress: 1.0),
        "cosine": _after_warmup(_cosine),
        "linear": _after_warmup(lambda progress: 1 - progress),
        "one_cycle": _one_cycle,
    }
)
"""Schedules by name."""
