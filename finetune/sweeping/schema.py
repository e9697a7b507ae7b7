"""The settings of a sweep: the keys of its file, which are also the options of its command."""

from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, field_validator, model_validator

from adapters.arguments import LARGEST
from adapters.errors import UserError, listed
from finetune.recipe.file import check_section, parse_value, read_mapping
from finetune.recipe.schema import NonNegative, Positive, Section
from finetune.recipe.yaml12 import Loader
from finetune.sweeping.axes import Axis, Choices, Range, hides, read_axis

KEYS = ("recipe", "over")
"""The keys that every sweep's file has; a recipe's has neither."""


class Sweep(Section):
    """A sweep over a recipe."""

    recipe: str
    """The recipe: a YAML file."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The sweep's folder under the recipe's ``runs_dir``; ``None``: the recipe's name and
    ``-sweep``."""
    overrides: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """``key=value`` pairs that replace the recipe's values in every run."""
    over: dict[str, Any] = Field(default={})
    """The fields to vary, by dotted key: a list of values, or a range ``{low, high, log}`` to draw
    from at random. A key of several fields with commas between them gives all the same value."""
    random: Positive | None = None
    """The number of combinations to draw at random; ``None``: all combinations."""
    seed: NonNegative = 0
    """The seed of the random draws."""
    seeds: Annotated[tuple[NonNegative, ...], Field(strict=False)] = ()
    """Seeds to train every combination with; none: the recipe's alone."""
    scales: Annotated[tuple[float, ...], Field(strict=False, min_length=1)] = (1.0,)
    """Adapter scales to score every run at."""
    at_once: Positive = 1
    """The number of runs at a time on this machine."""

    @field_validator("over")
    @classmethod
    def _check_axes(cls, over: dict[str, Any]) -> dict[str, Any]:
        mistakes, seen = [], set[str]()
        for key, values in over.items():
            try:
                keys = set(read_axis(key, values).keys)
            except UserError as error:
                mistakes.append(str(error))
            else:
                hidden = {old for old in seen for new in keys if hides(new, old)}
                mistakes += [f"{each} is given twice" for each in sorted(hidden)]
                seen |= keys
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return over

    @field_validator("seeds", "scales")
    @classmethod
    def _check_different(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"must be different (got {list(values)})")
        if any(abs(value) > LARGEST for value in values):
            raise ValueError(f"must be numbers that float32 holds (got {list(values)})")
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        ranges = [", ".join(axis.keys) for axis in self.axes if isinstance(axis, Range)]
        if ranges and self.random is None:
            raise ValueError(
                f"{'; '.join(ranges)}: a range needs random, the number of combinations to draw"
            )
        if self.random is not None and not self.over:
            raise ValueError("random needs over, the fields to draw")
        varied = [key for axis in self.axes for key in axis.keys] + ["seed"] * bool(self.seeds)
        for override in self.overrides:
            fixed = override.partition("=")[0]
            if any(hides(key, fixed) for key in varied):
                raise ValueError(f"{fixed} is both varied and set by {override!r}; leave one out")
        return self

    @property
    def axes(self) -> list[Axis]:
        """The fields to vary."""
        return [read_axis(key, values) for key, values in self.over.items()]

    @property
    def listed_axes(self) -> list[Choices]:
        """The axes of a grid."""
        return [axis for axis in self.axes if isinstance(axis, Choices)]


def read_sweep(
    path: str | Path,
    *,
    overrides: list[str],
    over: list[str],
    options: dict[str, str | None],
) -> Sweep:
    """Read a sweep from the command line.

    Args:
        path: a recipe, or a sweep's own file, whose values the rest replaces.
        overrides: ``key=value`` pairs for the recipe, added to the file's.
        over: ``key=values`` pairs, see :func:`read_values`.
        options: the sweep's other keys as texts; ``None``: not given.

    Raises:
        UserError: with every mistake.
    """
    tree = read_mapping(path, f"The file {path}")
    tree = tree if any(key in tree for key in KEYS) else {"recipe": str(path)}
    given = {key: text for key, text in options.items() if text is not None}
    for key, text in given.items():
        value = f"[{text}]" if key in ("seeds", "scales") else text
        tree[key] = text if key == "name" else parse_value(value, f"option --{key} {text}")
    own = tree.get("overrides")
    if overrides and isinstance(own, list | None):
        tree["overrides"] = [*(own or []), *overrides]
    varied = tree.get("over")
    read = list(map(read_values, over))
    keys = [key for key, _ in read]
    if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise UserError(f"--over has {listed(twice)} twice; list all values in one.")
    if over and isinstance(varied, dict | None):
        tree["over"] = dict(varied or {}) | dict(read)
    if isinstance(tree.get("scales"), list):  # 1 is as good as 1.0
        tree["scales"] = [float(s) if type(s) is int else s for s in tree["scales"]]
    return check_section(Sweep, tree, f"The sweep {path}")


def read_values(argument: str) -> tuple[str, Any]:
    """Read an axis from the command line.

    The argument is ``key=8,16`` with values letter for letter, or ``key={low: 1, high: 9}``.

    Raises:
        UserError: if it is neither.
    """
    key, equals, text = argument.partition("=")
    if not equals or not key or not text.strip():
        raise UserError(f"--over must be key=value,value,… (got {argument!r}).")
    if text.lstrip().startswith("{"):
        return key, parse_value(text, f"option --over {argument!r}")
    array = f"[{text}]"
    parse_value(array, f"option --over {argument!r}")
    node = yaml.compose(array, Loader=Loader)  # the nodes know each value's own text
    assert isinstance(node, yaml.SequenceNode)
    return key, [
        each.value
        if isinstance(each, yaml.ScalarNode)
        else array[each.start_mark.index : each.end_mark.index]
        for each in node.value
    ]
