"""Densities from which training timesteps are drawn, by name."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np


@dataclass(frozen=True)
class Density:
    """A distribution on 0 to 1, from the least noise to the most."""

    draw: Callable[..., float]
    """A function that takes a generator and the values of the parameters."""
    parameters: Mapping[str, float]
    """The names of the parameters, each with the bound that it must exceed."""


def _logit_normal(rng: np.random.Generator, mean: float, std: float) -> float:
    return 0.5 * (1 + math.tanh(rng.normal(mean, std) / 2))  # the sigmoid, without overflow


DENSITIES: Mapping[str, Density] = MappingProxyType(
    {
        "uniform": Density(np.random.Generator.random, {}),
        "beta": Density(np.random.Generator.beta, {"a": 0, "b": 0}),
        "logit_normal": Density(_logit_normal, {"mean": -math.inf, "std": 0}),
    }
)
"""Densities by name; ``logit_normal`` is the sigmoid of a normal variable (Stable Diffusion 3,
arXiv 2403.03206, section 3.1)."""
