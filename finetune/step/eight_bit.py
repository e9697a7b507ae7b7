"""bitsandbytes' 8-bit optimizers, with the bits of the state set per group of parameters."""

from typing import Any

import bitsandbytes as bnb


class _BitsByGroup:
    """An 8-bit optimizer that keeps each group's state in the group's own ``optim_bits``."""

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of one parameter, which bitsandbytes asks for by index."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        return config | {"optim_bits": group["optim_bits"], "min_8bit_size": 0}


class AdamW8bit(_BitsByGroup, bnb.optim.AdamW8bit):  # type: ignore[misc]  # untyped
    """AdamW."""


class PagedAdamW8bit(_BitsByGroup, bnb.optim.PagedAdamW8bit):  # type: ignore[misc]
    """AdamW whose state is paged out to main memory if a GPU runs short."""


class Lion8bit(_BitsByGroup, bnb.optim.Lion8bit):  # type: ignore[misc]
    """Lion."""
