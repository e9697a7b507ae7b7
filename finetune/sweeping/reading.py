"""Axes as they are written in a sweep's file and on the command line."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from adapters.arguments import LARGEST
from adapters.errors import UserError, closest, quote
from finetune.recipe.file import parse_value
from finetune.recipe.yaml12 import Loader
from finetune.sweeping.axes import Axis, Bundles, Choices, Range, hides

FARTHEST: Mapping[type, float] = {int: 2**63 - 1, float: LARGEST}
"""The largest absolute values of a range's ends: what NumPy draws, and what float32 holds."""

SET_BY_THE_SWEEP = {
    "name": "each run is named after its values",
    "runs_dir": "all runs are in the sweep's folder",
    "seed": "name the seeds of training in seeds, over which scores are averaged",
}
"""Keys of a recipe that are no axes, with the reason."""


def read_axis(key: str, values: Any) -> Axis:
    """Read an axis from a sweep's ``over`` or ``across`` section.

    Args:
        key: the dotted key of a field, or several with commas between them; of named values, the
            axis's own name.
        values: a list of values; or a range, ``{low: …, high: …}`` with ``log: true`` if wanted; or
            named values, each a section of overrides: ``{octopus: {data.source: …}, robot: {…}}``.

    Raises:
        UserError: if a key is one that the sweep sets, or the values are none of these.
    """
    keys = tuple(part.strip() for part in key.split(","))
    check_varied(keys)
    if isinstance(values, Mapping) and any(isinstance(each, Mapping) for each in values.values()):
        return _read_bundles(key, values)
    if isinstance(values, Mapping) and values:
        return _read_range(keys, values)
    if not isinstance(values, list) or not values:
        raise UserError(
            f"{key} must be a list of values, a range as in {{low: 1e-4, high: 1e-2, log: true}},"
            " or named values as in {small: {stage_1.adapter.rank: 4}, large: …}"
            f" (got {quote(values)})"
        )
    return Choices(keys, tuple(dict.fromkeys(map(_as_text, values))))


def check_varied(keys: Sequence[str]) -> None:
    """Raise a UserError if one of the keys is for the sweep to set."""
    for key in keys:
        if reason := SET_BY_THE_SWEEP.get(key):
            raise UserError(f"{key} cannot be varied: {reason}")


def _read_bundles(name: str, values: Mapping[Any, Any]) -> Bundles:
    """Read named values, and check that each sets every field once."""
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(
            f"{name} has named values, so it must have a name of its own, such as subject, of"
            " letters, digits, - and _"
        )
    bundles: dict[str, tuple[str, ...]] = {}
    for value, fields in values.items():
        text = _as_text(value).strip()
        if not text or value is None:
            raise UserError(f"{name} has a value without a name; name it")
        if text in bundles:
            raise UserError(f"{name} has two values named {text}; name one of them otherwise")
        if not isinstance(fields, Mapping):
            raise UserError(
                f"{name}.{text} must be a section of overrides, as in {{data.source: my_dog}}"
                f" (got {quote(fields)})"
            )
        pairs = list(_flatten(fields))
        keys = [key for key, _ in pairs]
        check_varied(keys)
        for place, key in enumerate(keys):
            if any(hides(key, earlier) for earlier in keys[:place]):
                raise UserError(f"{name}.{text} sets {key} twice; leave one out")
        bundles[text] = tuple(f"{key}={_as_text(each)}" for key, each in pairs)
    return Bundles(name, bundles)


def _flatten(fields: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of a section and its sections by dotted key."""
    for key, value in fields.items():
        dotted = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{dotted}.")
        else:
            yield dotted, value


def _read_range(keys: tuple[str, ...], values: Mapping[str, Any]) -> Range:
    """Read a range, and check its ends."""
    name, names = ", ".join(keys), ("low", "high", "log")
    for unknown in values.keys() - set(names):
        raise UserError(
            f"{name} has the unknown key {quote(unknown)}; {closest(str(unknown), names)}"
        )
    low, high = (_read_end(name, end, values.get(end)) for end in ("low", "high"))
    log = values.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{name}: log must be true or false (got {quote(log)})")
    if not low < high:
        raise UserError(f"{name}: low must be less than high (got {low} and {high})")
    if log and low <= 0:
        raise UserError(f"{name}: low must be above 0 with log: true (got {low})")
    whole = isinstance(low, int) and isinstance(high, int)
    return Range(keys, low, high, log, whole)


def _read_end(name: str, end: str, value: Any) -> float:
    """Read an end of a range."""
    farthest = FARTHEST.get(type(value))  # of none but numbers: a bool is of a type of its own
    if farthest is None or not abs(value) <= farthest:  # nor is nan
        most = "" if farthest is None else f" from {-farthest:.3g} to {farthest:.3g}"
        raise UserError(f"{name}: {end} must be a number{most} (got {quote(value)})")
    number: float = value
    return number


def _as_text(value: Any) -> str:
    """Write a value as it would stand in an override; JSON is YAML too."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_values(option: str, argument: str) -> tuple[str, Any]:
    """Read an axis from the command line.

    Args:
        option: the option's name, without dashes.
        argument: ``key=8,16`` with values letter for letter, or ``key={low: 1, high: 9}``, or
            ``name={one: {key: 8}, other: {key: 16}}``.

    Raises:
        UserError: if it is something else.
    """
    key, equals, text = argument.partition("=")
    if not equals or not key or not text.strip():
        raise UserError(f"--{option} must be key=value,value,… (got {quote(argument)}).")
    if text.lstrip().startswith("{"):
        return key, parse_value(text, f"option --{option} {quote(argument)}")
    array = f"[{text}]"
    parse_value(array, f"option --{option} {quote(argument)}")
    node = yaml.compose(array, Loader=Loader)  # the nodes know each value's own text
    assert isinstance(node, yaml.SequenceNode)
    return key, [
        each.value
        if isinstance(each, yaml.ScalarNode)
        else array[each.start_mark.index : each.end_mark.index]
        for each in node.value
    ]
