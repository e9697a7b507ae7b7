"""Optimizers by name.

Recipes are checked against this table, so torch and the optimizers' libraries, which are slow to
import, are imported only when an optimizer is built.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pkgutil import resolve_name
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Betas = tuple[float, float]

ADAM_BETAS = (0.9, 0.999)
LION_BETAS = (0.9, 0.99)

BLOCK = 2**8
"""The number of values that share a float32 scale in bitsandbytes' 8-bit states."""

SMALL = 2**12
"""The size below which a tensor keeps its state in 32 bits, as is bitsandbytes' default."""

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Slice:
    """A part of the weights that an optimizer updates as one tensor."""

    parameter: "nn.Parameter"
    fast: bool
    """True for B matrices, which LoRA+ gives a higher learning rate."""
    small: bool
    """True for tensors that are too small for a state in 8 bits."""


@dataclass(frozen=True)
class Algorithm:
    """An optimizer: its class, and how it treats a recipe's settings."""

    optimizer: str
    """``module:class``; takes parameter groups, ``weight_decay``, and ``betas`` if it has any."""
    betas: Betas | None
    """The default betas, for recipes that give none; ``None``: the optimizer has no betas."""
    moments: int
    """The number of state values kept on the device for each updated value."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the class."""
    eight_bit: bool = False
    """True if moments are kept in 8 bits, except those of small tensors."""
    whole_tensors: bool = False
    """True if each matrix must be its own tensor, because its rows and columns matter."""
    finds_scale: bool = False
    """True if the optimizer finds its own step size, which the learning rate only multiplies."""
    needs_gpu: bool = False
    """True if the optimizer runs only on a GPU."""
    averages: bool = False
    """True if the weights to use are an average, kept separately from those that train."""

    def state_bytes(self, slices: Iterable[Slice]) -> int:
        """Compute the bytes of device memory that the state of some slices takes."""
        eight_bit = 1 + FLOAT32_BYTES / BLOCK
        return sum(
            int(
                each.parameter.numel()
                * self.moments
                * (eight_bit if self.eight_bit and not each.small else FLOAT32_BYTES)
            )
            for each in slices
        )


OPTIMIZERS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "adamw_8bit": Algorithm("finetune.step.eight_bit:AdamW8bit", ADAM_BETAS, 2, eight_bit=True),
        "paged_adamw_8bit": Algorithm(
            "finetune.step.eight_bit:PagedAdamW8bit",
            ADAM_BETAS,
            0,
            eight_bit=True,
            needs_gpu=True,
        ),
        "adamw": Algorithm("torch.optim:AdamW", ADAM_BETAS, 2),
        "lion_8bit": Algorithm("finetune.step.eight_bit:Lion8bit", LION_BETAS, 1, eight_bit=True),
        "adafactor": Algorithm(
            "transformers.optimization:Adafactor",
            None,
            0,
            {"beta1": None, "scale_parameter": False, "relative_step": False},
            whole_tensors=True,
        ),
        "prodigy": Algorithm(
            "prodigyopt:Prodigy", ADAM_BETAS, 4, {"safeguard_warmup": True}, finds_scale=True
        ),
        "schedule_free": Algorithm("schedulefree:AdamWScheduleFree", ADAM_BETAS, 2, averages=True),
    }
)
"""Optimizers by name."""


def build_optimizer(
    name: str,
    slices: Iterable[Slice],
    *,
    learning_rate: float,
    betas: Betas | None = None,
    weight_decay: float,
    lora_plus_ratio: float = 1.0,
) -> "Optimizer":
    """Build the optimizer of an adapter's parameters.

    The B matrices, which start at zero, have a learning rate ``lora_plus_ratio`` times that of the
    rest (LoRA+, arXiv 2402.12354). ``betas``: ``None`` for the optimizer's own.
    """
    algorithm = OPTIMIZERS[name]
    assert betas is None or algorithm.betas is not None, f"{name} has no betas"
    groups: dict[tuple[float, int], dict[str, Any]] = {}
    for each in slices:
        rate = learning_rate * (lora_plus_ratio if each.fast else 1.0)
        bits = 8 if algorithm.eight_bit and not each.small else 8 * FLOAT32_BYTES
        new = {"params": [], "lr": rate, "base_lr": rate, "optim_bits": bits}
        groups.setdefault((rate, bits), new)["params"].append(each.parameter)
    decay = {} if algorithm.betas is None else {"betas": betas or algorithm.betas}
    optimizer: Any = resolve_name(algorithm.optimizer)(
        list(groups.values()), weight_decay=weight_decay, **decay, **algorithm.options
    )
    if algorithm.averages:
        optimizer.train()
    return optimizer


def set_learning_rate(optimizer: "Optimizer", factor: float) -> None:
    """Set each group's learning rate to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


@contextmanager
def averaged_weights(name: str, optimizer: Any) -> Iterator[None]:
    """Give the parameters their averaged values, if the optimizer keeps an average."""
    if OPTIMIZERS[name].averages:
        optimizer.eval()
    try:
        yield
    finally:
        if OPTIMIZERS[name].averages:
            optimizer.train()
