"""PEFT's methods of combining LoRAs into one, and their settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from adapters.arguments import check_seeds
from adapters.errors import UserError


class Method(NamedTuple):
    """The settings and adapters that a method requires, besides scales."""

    pairs: bool = False
    """True if it combines A with A and B with B, so that their ranks must be equal."""
    prunes: bool = False
    """True if it keeps only a share of the values, the density."""
    elects: bool = False
    """True if it keeps the values of one sign only, elected by ``majority_sign``."""
    cuts: bool = False
    """True if it combines the products B A, and cuts the result off at a rank by SVD."""


MOST_RANK = 10_000
"""The largest rank of a result, beyond that of any weight."""

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "linear": Method(pairs=True),
        "cat": Method(),
        "svd": Method(cuts=True),
        "ties": Method(pairs=True, prunes=True, elects=True),  # arXiv 2306.01708
        "ties_svd": Method(cuts=True, prunes=True, elects=True),
        "dare_linear": Method(pairs=True, prunes=True),  # arXiv 2311.03099
        "dare_linear_svd": Method(cuts=True, prunes=True),
        "dare_ties": Method(pairs=True, prunes=True, elects=True),
        "dare_ties_svd": Method(cuts=True, prunes=True, elects=True),
        "magnitude_prune": Method(pairs=True, prunes=True),
        "magnitude_prune_svd": Method(cuts=True, prunes=True),
    }
)
"""PEFT's methods, by its names.

``cat`` gives the sum of the updates, as merging all of them does, and ``svd`` the nearest to that
sum of a given rank. Methods that combine A with A and B with B give no such sum.
"""


@dataclass(frozen=True)
class Combination:
    """A method of :data:`METHODS` and its settings."""

    method: str = "linear"
    density: float | None = None
    """The share of values that pruning methods keep, above 0 and up to 1."""
    rank: int | None = None
    """The rank that SVD methods cut off at; ``None``: the largest of the adapters."""
    majority_sign: str | None = None
    """The rule that elects a sign: the ``total`` of values (also ``None``) or their
    ``frequency``."""
    seed: int = 0
    """The seed of the values that DARE drops, which differ between GPU and CPU."""

    def __post_init__(self) -> None:
        """Raise a UserError if a setting is missing, invalid, or ignored by the method."""
        check_seeds([self.seed])
        if self.method not in METHODS:
            raise UserError(f"method must be one of {', '.join(METHODS)} (got {self.method!r}).")
        density, rank, sign = self.density, self.rank, self.majority_sign
        dense = density is not None and 0 < density <= 1
        fits = rank is None or 1 <= rank <= MOST_RANK
        for setting, value, asked, valid, expected in (
            ("density", density, self.asks.prunes, dense, "above 0 and up to 1"),
            ("rank", rank, self.asks.cuts, fits, f"from 1 to {MOST_RANK}"),
            (
                *("majority_sign", sign, self.asks.elects),
                *(sign in (None, "total", "frequency"), "of total or frequency"),
            ),
        ):
            if asked and not valid:
                raise UserError(f"{self.method!r} needs a {setting} {expected} (got {value!r}).")
            if value is not None and not asked:
                raise UserError(
                    f"{self.method!r} takes no {setting} (got {value!r}); leave it out."
                )

    @property
    def asks(self) -> Method:
        """The method's requirements."""
        return METHODS[self.method]
