"""The settings of a sweep: the keys of its file, which are also the options of its command."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from adapters.arguments import LARGEST
from adapters.errors import UserError, listed, quote
from finetune.recipe.file import check_section, parse_value, read_mapping
from finetune.recipe.schema import NonNegative, Positive, Section
from finetune.recipe.schema.fields import LONGEST_NAME, NAME, PathText, Seed
from finetune.sweeping.axes import Axis, Listed, Range, hides
from finetune.sweeping.reading import read_axis, read_values

KEYS = ("recipe", "over", "across")
"""The keys of which every sweep's file has some; a recipe's has none."""

MOST_RUNS = 1000
"""The most runs of a sweep."""

TEXTS = ("name", "against")
"""The options that are taken letter for letter."""


class Sweep(Section):
    """A sweep over a recipe."""

    recipe: PathText
    """The recipe: a YAML file."""
    name: str | None = Field(default=None, pattern=NAME, max_length=LONGEST_NAME)
    """The sweep's folder under the recipe's ``runs_dir``; ``None``: the recipe's name and
    ``-sweep``."""
    overrides: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """``key=value`` pairs that replace the recipe's values in every run."""
    over: dict[str, Any] = Field(default={})
    """The fields to vary, by dotted key: a list of values, or a range ``{low, high, log}`` to draw
    from at random. A key of several fields with commas between them gives all the same value. Or,
    by a name of its own, named values that set several fields each, such as
    ``{small: {stage_1.adapter.rank: 4}, large: {…}}``."""
    across: dict[str, Any] = Field(default={})
    """Axes like those of ``over``, but without ranges, on which every combination is trained and
    across which its scores are averaged, as over seeds: above all the subject, such as ``subject:
    {dog: {data.source: …, evaluation.identifier: …}, cat: {…}}``."""
    random: Annotated[int, Field(ge=1, le=MOST_RUNS)] | None = None
    """The number of combinations to draw at random; ``None``: all combinations."""
    seed: NonNegative = 0
    """The seed of the random draws."""
    seeds: Annotated[tuple[Seed, ...], Field(strict=False)] = ()
    """Seeds to train every combination with; none: the recipe's alone."""
    scales: Annotated[tuple[float, ...], Field(strict=False, min_length=1)] = (1.0,)
    """Adapter scales to score every run at."""
    against: str | None = None
    """The combination that others are compared with, by the name that its runs' folders begin with,
    and its scale, such as ``rank-8`` or ``rank-8=0.7``; ``None``: the first. The scale is 1 unless
    given, or the first if 1 is not scored."""
    keep_others: Annotated[float, Field(ge=0)] = 0.9
    """The least share of the base's CLIP-T of other prompts that a recommendation keeps."""
    at_once: Positive = 1
    """The number of runs at a time on this machine."""

    @field_validator("over", "across")
    @classmethod
    def _check_axes(cls, axes: dict[str, Any]) -> dict[str, Any]:
        mistakes = []
        for key, values in axes.items():
            try:
                read_axis(key, values)
            except UserError as error:
                mistakes.append(str(error))
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return axes

    @field_validator("across")
    @classmethod
    def _check_listed(cls, across: dict[str, Any]) -> dict[str, Any]:
        if ranges := [k for k, values in across.items() if isinstance(read_axis(k, values), Range)]:
            raise ValueError(f"{listed(ranges)} must list values, as scores are averaged over all")
        return across

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
        if twice := sorted(self.over.keys() & self.across.keys()):
            raise ValueError(f"{listed(twice)} is given twice, in over and in across")
        varied: dict[str, str] = {}
        for name, axis in zip([*self.over, *self.across], self.all_axes, strict=True):
            for old in varied:
                if any(hides(key, old) for key in axis.keys):
                    raise ValueError(f"{old} is given twice, by {varied[old]} and by {name}")
            varied |= dict.fromkeys(axis.keys, name)
        for override in self.overrides:
            fixed = override.partition("=")[0]
            if any(hides(key, fixed) for key in [*varied, *["seed"] * bool(self.seeds)]):
                raise ValueError(f"{fixed} is both varied and set by {override!r}; leave one out")
        if self.count > MOST_RUNS:
            raise ValueError(
                f"it has {self.count:,} runs, more than {MOST_RUNS:,}: vary less, or draw at random"
            )
        return self

    @property
    def axes(self) -> list[Axis]:
        """The fields to vary."""
        return [read_axis(key, values) for key, values in self.over.items()]

    @property
    def count(self) -> int:
        """The number of runs."""
        own = self.random or math.prod(int(axis.size) for axis in self.listed_axes)
        others = math.prod(int(axis.size) for axis in self.across_axes)
        return own * others * max(len(self.seeds), 1)

    @property
    def listed_axes(self) -> list[Listed]:
        """The axes of a grid."""
        return [axis for axis in self.axes if not isinstance(axis, Range)]

    @property
    def across_axes(self) -> list[Listed]:
        """The axes across which scores are averaged."""
        read = (read_axis(key, values) for key, values in self.across.items())
        return [axis for axis in read if not isinstance(axis, Range)]

    @property
    def all_axes(self) -> list[Axis]:
        """The axes of ``over``, then those of ``across``."""
        return [*self.axes, *self.across_axes]


def read_sweep(
    path: str | Path,
    *,
    overrides: list[str],
    over: list[str],
    across: Sequence[str] = (),
    options: dict[str, str | None],
) -> Sweep:
    """Read a sweep from the command line.

    Args:
        path: a recipe, or a sweep's own file, whose values the rest replaces.
        overrides: ``key=value`` pairs for the recipe, added to the file's.
        over: ``key=values`` pairs, see :func:`read_values`.
        across: likewise, see :attr:`Sweep.across`.
        options: the sweep's other keys as texts; ``None``: not given.

    Raises:
        UserError: with every mistake.
    """
    tree = read_mapping(path, f"The file {path}")
    tree = tree if any(key in tree for key in KEYS) else {"recipe": str(path)}
    given = {key: text for key, text in options.items() if text is not None}
    for key, text in given.items():
        value = f"[{text}]" if key in ("seeds", "scales") else text
        tree[key] = text if key in TEXTS else parse_value(value, f"option --{key} {quote(text)}")
    own = tree.get("overrides")
    if overrides and isinstance(own, list | None):
        tree["overrides"] = [*(own or []), *overrides]
    for section, axes in (("over", over), ("across", across)):
        read = [read_values(section, axis) for axis in axes]
        keys = [key for key, _ in read]
        if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
            raise UserError(f"--{section} has {listed(twice)} twice; list all values in one.")
        known = tree.get(section)
        if read and isinstance(known, dict | None):
            tree[section] = dict(known or {}) | dict(read)
    if isinstance(tree.get("scales"), list):  # 1 is as good as 1.0
        tree["scales"] = [float(s) if type(s) is int else s for s in tree["scales"]]
    return check_section(Sweep, tree, f"The sweep {path}")
