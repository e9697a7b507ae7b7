"""The ``timesteps`` section of a stage: their range and density."""

from typing import Annotated

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from adapters.errors import name_in
from finetune.recipe.schema.fields import NonNegative, Section
from finetune.step.timesteps import DENSITIES

LARGEST_SHAPE = 1e6
"""The largest parameter of a density; beyond it all timesteps are the same, or arithmetic fails."""


class Timesteps(Section):
    """The distribution of the timesteps that a stage is trained at; 0 has the least noise."""

    low: NonNegative = 0
    """The lowest timestep drawn."""
    high: NonNegative | None = None
    """The highest timestep drawn; ``None``: the last of the base's schedule."""
    density: Annotated[str, name_in(DENSITIES)] = "uniform"
    """The density from low to high: one of the names in ``finetune.step.timesteps.DENSITIES``."""
    shape: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """The parameters of ``beta``, [a, b], or of ``logit_normal``, [mean, std]. With ``beta``,
    [1, 2] favours low timesteps (detail), [2, 1] high ones (composition) and [2, 2] those between.
    ``None``: for ``uniform``, which has no parameters."""

    @field_validator("high")
    @classmethod
    def _check_not_below(cls, high: int | None, info: ValidationInfo) -> int | None:
        low = info.data.get("low", 0)
        if high is not None and high < low:
            raise ValueError(f"must be at least low, {low} (got {high})")
        return high

    @field_validator("shape")
    @classmethod
    def _check_shape(
        cls, shape: tuple[float, float] | None, info: ValidationInfo
    ) -> tuple[float, float] | None:
        if (name := info.data.get("density")) is None:  # its own mistake is reported
            return shape
        parameters, values = DENSITIES[name].parameters, shape or ()
        if len(values) != len(parameters):
            expected = f"[{', '.join(parameters)}]" if parameters else "left out"
            raise ValueError(f"must be {expected} with {name} (got {list(values) or None})")
        for value, (parameter, bound) in zip(values, parameters.items(), strict=True):
            if not bound < value <= LARGEST_SHAPE:
                raise ValueError(
                    f"{parameter} must be greater than {bound} and at most {LARGEST_SHAPE:g}"
                    f" (got {value})"
                )
        return shape

    def draw(self, rng: np.random.Generator, count: int) -> int:
        """Draw a timestep below ``count``; each has an equal part of the range 0 to 1."""
        high = count - 1 if self.high is None else self.high
        place = DENSITIES[self.density].draw(rng, *self.shape or ())
        return min(self.low + int(place * (high + 1 - self.low)), high)  # a place may round to 1
