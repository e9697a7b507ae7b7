"""Names: of a UNet's parts, those that a user picks from a table, and many in one sentence."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from pydantic import AfterValidator

ROOTS = (
    *("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out"),
    *("time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj"),
)
"""The top-level modules of IF's UNets that adapters attach to."""


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Names in a sentence; of more than ``limit``, how many more."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def closest(word: str, names: Sequence[str]) -> str:
    """A hint at the valid name that a word was probably meant to be."""
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(names)}"


def name_in(table: Mapping[str, object]) -> AfterValidator:
    """A pydantic validator: the name of a row, or an error that hints at the closest."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown name {name!r}; {closest(name, list(table))}")
        return name

    return AfterValidator(check)
