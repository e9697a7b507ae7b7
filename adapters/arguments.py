"""Parsing and checks of users' arguments: adapter scales, seeds, devices and paths."""

import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from adapters.errors import UserError, quote

if TYPE_CHECKING:
    import torch

Scale: TypeAlias = float | Mapping[int, float]
"""The factor of an adapter's updates: one for all its stages, or one by stage (0 if not named).

It multiplies the whole update, W merged - W. diffusers does the same, except with a DoRA, whose
magnitudes it applies in full: see :meth:`adapters.cascade.adapter_set.AdaptedStages.set_adapters`.
"""

Scales: TypeAlias = Mapping[str, Scale] | Sequence[str] | str
"""Adapters by name, each with its scale; names without scales have a scale of 1."""

LARGEST_SCALE = 1000
"""The largest scale of an adapter, far beyond all that draws a picture."""

LARGEST = (2 - 2**-23) * 2.0**127
"""The largest alpha: float32's largest number, because updates are merged in float32."""

LAST_SEED = 0xFFFF_FFFF_FFFF_FFFF
"""The largest seed that a PyTorch generator takes."""

STAGES = (1, 2)
"""The stages that can have adapters."""


def expand_home(path: str | Path) -> Path:
    """Expand the ``~`` that a path may begin with.

    Raises:
        UserError: if it is of someone who is not a user of this machine.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):
        raise UserError(
            f"{quote(str(path))} names no user's home folder; correct the name after the ~."
        ) from None


def read_scales(scales: Scales) -> Mapping[str, Scale]:
    """Read the scale of each named adapter."""
    if isinstance(scales, Mapping):
        return scales
    if not isinstance(scales, str | Iterable):
        raise UserError(
            "Adapters must be given by name, each with its scale or not (got"
            f" {quote(scales)}); give {{name: scale}}."
        )
    return dict.fromkeys([scales] if isinstance(scales, str) else scales, 1.0)


def is_factor(factor: object) -> bool:
    """Tell whether a factor can multiply an update: a finite number in float32's range."""
    return isinstance(factor, numbers.Real) and abs(cast(float, factor)) <= LARGEST


def is_scale(scale: object) -> bool:
    """Tell whether a number can be the scale of an adapter."""
    return is_factor(scale) and abs(cast(float, scale)) <= LARGEST_SCALE


def split_scale(
    scale: Scale, own: Collection[int], loaded: Collection[int], what: str
) -> dict[int, float]:
    """Split the scale of an adapter into its factor in each of its own stages that are loaded.

    Factors for stages that are not loaded are ignored; ``what`` names the adapter in messages.

    Raises:
        UserError: if a factor is not a number within bounds, or is for a stage that the adapter
            lacks.
    """
    factors = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(own, scale)
    for stage, factor in factors.items():
        if not is_scale(factor):
            raise UserError(
                f"The scale of {what} must be a number from -{LARGEST_SCALE} to {LARGEST_SCALE}"
                f" (got {quote(factor)})."
            )
        if stage not in STAGES or (stage in loaded and stage not in own):
            raise UserError(
                f"The scale of {what} names Stage {stage!r}, but it has only Stage"
                f" {' and '.join(map(str, own))}; leave out Stage {stage!r}."
            )
    return {stage: float(factors.get(stage, 0.0)) for stage in own}


def parse_scaled(argument: str) -> tuple[str, Scale | None]:
    """Parse an adapter and its scale.

    The argument is ``FOLDER`` (a scale of ``None``), ``FOLDER=0.7`` or, by stage,
    ``FOLDER=1:0.5,2:1``. If the whole argument is an existing path, it is taken as the folder.

    Raises:
        UserError: if the text after the last ``=`` is not a scale.
    """
    folder, sign, text = argument.rpartition("=")
    if not sign or Path(argument).exists():
        return argument, None
    try:
        return folder, parse_scale(text)
    except ValueError:
        raise UserError(
            f"{argument!r} ends in {text!r}, which is not a scale; give FOLDER=0.7, or one for each"
            " stage as in FOLDER=1:0.5,2:1."
        ) from None


def parse_scale(text: str) -> Scale:
    """Parse a number, or one by stage, as in ``1:0.5,2:1``; raise ValueError for other texts."""
    if ":" not in text:
        return float(text)
    pairs = [pair.split(":") for pair in text.split(",")]
    scales = {int(stage): float(factor) for stage, factor in pairs}
    if len(scales) < len(pairs):
        raise ValueError("a stage is given twice")
    return scales


def format_scales(scales: Mapping[int, float]) -> str:
    """Format scales by stage so that :func:`parse_scale` reads exactly the same ones."""
    return ",".join(f"{stage}:{scale!r}" for stage, scale in scales.items())


def find_device(name: "str | torch.device") -> "torch.device":
    """Find a device by name and place a tensor on it; ``auto`` is a GPU if there is one.

    Raises:
        UserError: if the device cannot be used.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        placed = torch.empty(0, device=name)
        placed.cpu()  # fails on meta and the like, which keep no values
        return placed.device
    except (RuntimeError, AssertionError, TypeError) as error:  # PyTorch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"The device {str(name)!r} cannot be used ({reason}); choose auto, cpu, or cuda where"
            " there is a GPU."
        ) from error


def check_seeds(seeds: Iterable[object]) -> None:
    """Raise a UserError if one of the seeds cannot seed a PyTorch generator."""
    for seed in seeds:
        if not isinstance(seed, numbers.Integral) or not 0 <= int(seed) <= LAST_SEED:
            raise UserError(
                f"A seed must be a whole number from 0 to {LAST_SEED} (got {seed!r}); choose"
                " another."
            )
