"""Optimizers and learning-rate schedules by name."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import bitsandbytes as bnb
import prodigyopt
import schedulefree
import torch
from transformers.optimization import Adafactor

from adapters.errors import UserError
from finetune.step.flat_weights import BLOCK, Slice

Groups = list[dict[str, Any]]
Betas = tuple[float, float]

ADAM_BETAS = (0.9, 0.999)
LION_BETAS = (0.9, 0.99)

FULL_BITS = torch.finfo(torch.float32).bits

EIGHT_BIT = 1 + 4 / BLOCK
"""Bytes of an 8-bit moment: bitsandbytes keeps one float32 scale a block."""


@dataclass(frozen=True)
class Algorithm:
    """An optimizer: how it is built, and what it makes of the recipe's settings."""

    build: Callable[..., torch.optim.Optimizer]
    """Takes the parameter groups, ``weight_decay``, and ``betas`` where it has any."""
    betas: Betas | None
    """Its own betas, for recipes that give none; ``None``: it has no betas."""
    moments: int
    """How many values it keeps on the device for each value that it updates."""
    eight_bit: bool = False
    """Whether it keeps them in 8 bits, except those of small tensors."""
    whole_tensors: bool = False
    """Whether it treats a matrix as more than its elements, so that it needs each by itself."""
    finds_scale: bool = False
    """Whether it finds its own step size, which the learning rate only multiplies."""

    def state_bytes(self, slices: Iterable[Slice]) -> int:
        """Bytes of the device's memory that its state takes for what it updates."""
        return sum(
            int(
                each.parameter.numel()
                * self.moments
                * (EIGHT_BIT if self.eight_bit and not each.kind.small else 4)
            )
            for each in slices
        )


class _BitsByGroup:
    """An 8-bit optimizer that keeps each group's state in the group's ``optim_bits``."""

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Settings of one parameter, as bitsandbytes asks for them."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        return config | {"optim_bits": group["optim_bits"], "min_8bit_size": 0}


class AdamW8bit(_BitsByGroup, bnb.optim.AdamW8bit):  # type: ignore[misc]  # untyped
    """AdamW."""


class PagedAdamW8bit(_BitsByGroup, bnb.optim.PagedAdamW8bit):  # type: ignore[misc]
    """AdamW whose state is paged out to main memory where a GPU runs short."""

    def __init__(self, groups: Groups, **options: Any) -> None:
        if not torch.cuda.is_available():
            raise UserError(
                "optimizer.name: paged_adamw_8bit needs a GPU, to page its state out of; this"
                " machine has none: use adamw_8bit."
            )
        super().__init__(groups, **options)


class Lion8bit(_BitsByGroup, bnb.optim.Lion8bit):  # type: ignore[misc]
    """Lion."""


OPTIMIZERS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "adamw_8bit": Algorithm(AdamW8bit, ADAM_BETAS, 2, eight_bit=True),
        "paged_adamw_8bit": Algorithm(PagedAdamW8bit, ADAM_BETAS, 0, eight_bit=True),
        "adamw": Algorithm(torch.optim.AdamW, ADAM_BETAS, 2),
        "lion_8bit": Algorithm(Lion8bit, LION_BETAS, 1, eight_bit=True),
        "adafactor": Algorithm(
            partial(Adafactor, beta1=None, scale_parameter=False, relative_step=False),
            betas=None,
            moments=0,
            whole_tensors=True,
        ),
        "prodigy": Algorithm(
            partial(prodigyopt.Prodigy, safeguard_warmup=True), ADAM_BETAS, 4, finds_scale=True
        ),
        "schedule_free": Algorithm(schedulefree.AdamWScheduleFree, ADAM_BETAS, 2),
    }
)
"""Optimizers by name."""


def build_optimizer(
    name: str,
    slices: Sequence[Slice],
    *,
    learning_rate: float,
    betas: Betas | None = None,
    weight_decay: float,
    lora_plus_ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """Build the optimizer of an adapter's parameters.

    With ``lora_plus_ratio`` above 1 the B matrices, which start at zero, learn that much faster
    than the rest (LoRA+, arXiv 2402.12354). ``betas``: ``None`` for the optimizer's own.
    """
    algorithm = OPTIMIZERS[name]
    assert betas is None or algorithm.betas is not None, f"{name} has no betas"
    groups: dict[tuple[float, int], dict[str, Any]] = {}
    for each in slices:
        rate = learning_rate * (lora_plus_ratio if each.kind.fast else 1.0)
        bits = 8 if algorithm.eight_bit and not each.kind.small else FULL_BITS
        new = {"params": [], "lr": rate, "base_lr": rate, "optim_bits": bits}
        groups.setdefault((rate, bits), new)["params"].append(each.parameter)
    decay = {} if algorithm.betas is None else {"betas": betas or algorithm.betas}
    optimizer = algorithm.build(list(groups.values()), weight_decay=weight_decay, **decay)
    if isinstance(optimizer, schedulefree.AdamWScheduleFree):
        optimizer.train()
    return optimizer


Schedule = Callable[[int, int, int], float]
"""The learning rate over its peak, of a step (from 0), the steps of the run, and its warm-up."""


def _cosine(progress: float) -> float:
    """Fall from 1 to 0 as progress goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _after_warmup(fall: Callable[[float], float]) -> Schedule:
    """Rise linearly from zero in the warm-up, then fall: as ``transformers.get_scheduler`` does."""

    def factor(step: int, steps: int, warmup_steps: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return fall((step - warmup_steps) / max(steps - warmup_steps, 1))

    return factor


ONE_CYCLE_ENDS = 1 / 25, 1e-4
"""Where one-cycle starts and ends: upstream's 4e-6 and 1e-8 for a peak of 1e-4."""

ONE_CYCLE_WARMUP = 0.3
"""The share of one-cycle's steps that is warm-up where the recipe gives none."""


def _one_cycle(step: int, steps: int, warmup_steps: int) -> float:
    """Torch's ``OneCycleLR``, whose warm-up ends with its last step at the peak.

    In runs of less than four steps 0.3 of them are no step: these start at the peak.
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


def learning_rate_factor(schedule: str, step: int, steps: int, warmup_steps: int = 0) -> float:
    """The learning rate of a step (from 0) over its peak: a function of the step alone."""
    return SCHEDULES[schedule](step, steps, warmup_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The parameters as they are to be used: schedule-free training keeps them as an average."""
    if not isinstance(optimizer, schedulefree.AdamWScheduleFree):
        yield
        return
    optimizer.eval()
    yield
    optimizer.train()
