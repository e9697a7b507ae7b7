"""Mistakes that pydantic finds, in the words of a reader of YAML and JSON."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from adapters.errors import quote

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "missing": "must be given",
        **dict.fromkeys(
            ("model_type", "model_attributes_type", "dict_type"),
            "must be a section of keys and values",
        ),
        "invalid_key": "must be a text, as every key",
        **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
        "recursion_loop": "must not contain itself",
        "string_type": "must be a text",
        "string_unicode": "must be a text in UTF-8",
        "string_too_long": "must have at most {max_length} letters",
        "string_pattern_mismatch": "must be of the form {pattern}",
        **dict.fromkeys(("int_type", "int_from_float"), "must be a whole number"),
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "bool_type": "must be true or false",
        "greater_than": "must be above {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be below {lt}",
        "less_than_equal": "must be at most {le}",
        "literal_error": "must be {expected}",
        "too_short": "must have at least {min_length} item(s), not {actual_length}",
        "too_long": "must have at most {max_length} item(s), not {actual_length}",
    }
)
"""Expected values, by pydantic's type of mistake."""

SHOWN = 30
"""The most mistakes that a message lists."""

WHOLE = ("missing", "value_error", "extra_forbidden")
"""The types of mistakes whose words say it all, so that the value found is not added."""


def list_mistakes(rows: Sequence[str]) -> str:
    """List mistakes: one in the sentence, several in a row each, of many the first.

    Example:
        >>> from adapters.mistakes import list_mistakes
        >>> list_mistakes(["seed: must be a whole number (got 1.5)"])
        'a mistake: seed: must be a whole number (got 1.5).'
    """
    if len(rows) == 1:
        return f"a mistake: {rows[0]}{'' if rows[0].endswith(('?', '.')) else '.'}"
    more = [f"and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    listed = "\n".join(f"  {row}" for row in [*rows[:SHOWN], *more])
    return f"{len(rows)} mistakes:\n{listed}"


def describe_expected(mistake: ErrorDetails) -> str:
    """Say what a mistaken value should have been, such as ``must be at least 1``."""
    words = WORDS.get(mistake["type"])
    if words is None:
        return mistake["msg"].removeprefix("Value error, ")
    return words.format(**{k: _format(value) for k, value in mistake.get("ctx", {}).items()})


def describe_found(value: Any) -> str:
    """Show a value that was found, as YAML writes it."""
    if value is None or isinstance(value, bool):
        return f"(got {'null' if value is None else str(value).lower()})"
    return f"(got {quote(value)})"


def describe_first(error: ValidationError) -> tuple[str, str]:
    """Return the field of the first mistake, and what was expected and found there.

    Of a field that may be of several types, all are named. Mistakes that involve several fields
    name them in their own words, and the field is empty.
    """
    first, *others = error.errors(include_url=False)
    field = ".".join(
        str(part)
        for part in first["loc"]  # pydantic's names of the types of a field are no identifiers
        if isinstance(part, int) or part.isidentifier()
    )
    same = [first, *(each for each in others if each["loc"][:1] == first["loc"][:1])]
    words = dict.fromkeys(describe_expected(each).removeprefix("must be ") for each in same)
    expected = describe_expected(first) if len(words) == 1 else f"must be {' or '.join(words)}"
    found = "" if first["type"] in WHOLE else f" {describe_found(first['input'])}"
    return field, f"{expected}{found}"


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
