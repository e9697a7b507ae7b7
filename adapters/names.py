"""Names that a user picks from a table, and what was probably meant by one that is not in it."""

import difflib
from collections.abc import Mapping, Sequence

from pydantic import AfterValidator


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
