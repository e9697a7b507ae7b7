"""Reading a recipe: its file, what the command line lays over it, and its mistakes in words."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from adapters.errors import UserError, closest
from finetune.recipe.schema import Place, Recipe
from finetune.recipe.yaml12 import Loader

NAMING = (yaml.AnchorToken, yaml.AliasToken, yaml.TagToken)
"""What YAML takes for the name of a value, or of its type."""

DEEPEST = 20
"""More levels than any key of a recipe has."""

YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
"""What reading YAML raises: of ``!!int abc`` and of what is nested too deeply, no YAMLError."""


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: ``dotted.key=value`` pairs laid over it. Of a field that holds a text the value
            is that text, letter for letter (``null``: none, where that is allowed); of others it is
            YAML.

    Raises:
        UserError: listing every mistake with its path: unknown keys and names (with the closest
            valid one), wrong types, values out of range, sections that do not go together.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {path} cannot be read: {error}.") from error
    except YAML_ERRORS as error:
        raise UserError(f"The recipe {path} is not valid YAML: {error}.") from error
    if not isinstance(tree, dict):
        raise UserError(f"The recipe {path} must be a YAML mapping (got {type(tree).__name__}).")
    for override in overrides:
        tree = _overridden(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        rows = _explain(error)
        listed = "\n".join(f"  {row}" for row in rows)
        raise UserError(f"The recipe {path} has {len(rows)} mistake(s):\n{listed}") from None


def _overridden(tree: dict[str, Any], override: str) -> dict[str, Any]:
    """The tree with one value replaced; what YAML aliases share stays as it is elsewhere."""
    path, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"An override must be key=value (got {override!r}).")
    if path.count(".") > DEEPEST:
        raise UserError(
            f"No key of a recipe lies so deep as that of the override {override[:80]!r}…"
        )
    kinds = _kinds_at(path.split("."))
    is_none = text == "null" and NoneType in kinds
    is_text = str in kinds and kinds <= {str, NoneType} and not is_none
    value = text if is_text else _value(text, override)

    def laid_over(node: Any, key: str, *rest: str) -> dict[str, Any]:
        node = {} if node is None else node
        if not isinstance(node, dict):
            raise UserError(f"The override {override!r} goes below a value that is no section.")
        return {**node, key: laid_over(node.get(key), *rest) if rest else value}

    return laid_over(tree, *path.split("."))


def _value(text: str, override: str) -> Any:
    """The value of an override in YAML, where YAML reads all of its text as a value."""
    try:
        value = yaml.load(text, Loader=Loader)
        tokens = [t for t in yaml.scan(text) if not isinstance(t, yaml.StreamEndToken)]
    except YAML_ERRORS as error:
        raise UserError(
            f"The value of the override {override!r} is not valid YAML: texts within it that have"
            " any of : # & * ! [ ] { } , must be in quotes."
        ) from error
    rest = text[tokens[-1].end_mark.index :].strip()
    named = [text[t.start_mark.index : t.end_mark.index] for t in tokens if isinstance(t, NAMING)]
    if rest or named:
        raise UserError(
            f"The override {override!r} has {(named or [rest])[0]!r} in it, which YAML does not"
            " take as text; put the text in quotes."
        )
    return value


def _explain(error: ValidationError) -> list[str]:
    """One line a mistake: path, expected, found."""
    rows = []
    found = [(_path(mistake["loc"]), mistake) for mistake in error.errors(include_url=False)]
    for _, field in groupby(found, lambda pair: [p for p in pair[0] if isinstance(p, str)]):
        mistakes: dict[Place, list[ErrorDetails]] = {}
        for path, mistake in field:
            mistakes.setdefault(path, []).append(mistake)
        deepest = max(map(len, mistakes))  # of a union's branches, the one that got furthest
        rows += [_row(*pair) for pair in mistakes.items() if len(pair[0]) == deepest]
    return rows


def _row(path: Place, mistakes: list[ErrorDetails]) -> str:
    """What is wrong at a place: one mistake, or one for each branch of a union."""
    first = mistakes[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown key; {closest(str(path[-1]), _fields_at(path[:-1]))}"
    elif first["type"] not in ("missing", "value_error"):
        others = [mistake["msg"].removeprefix("Input should be ") for mistake in mistakes[1:]]
        message = f"{' or '.join([message, *others])} (got {first['input']!r})"
    place = ".".join(map(str, path))
    return f"{place}: {message}" if place else message


def _path(place: Place) -> Place:
    """A place in the recipe, without the names that pydantic gives the branches of unions."""
    section: type[BaseModel] | None = Recipe
    path: list[int | str] = []
    for part in place:
        if section is not None or isinstance(part, int):
            path.append(part)
        section = section and _below(section, part)
    return tuple(path)


def _fields_at(path: Place) -> list[str]:
    """The names of the fields of the section at a path."""
    section: type[BaseModel] | None = Recipe
    for part in path:
        assert section is not None
        section = _below(section, part)
    assert section is not None
    return list(section.model_fields)


def _below(section: type[BaseModel], name: int | str) -> type[BaseModel] | None:
    """The section that a field of a section holds, if it holds one."""
    kinds = (kind for kind in _kinds(section, name) if isinstance(kind, type))
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def _kinds_at(path: Sequence[str]) -> set[Any]:
    """The types that the field at a path may hold; none where there is no such field."""
    section: type[BaseModel] | None = Recipe
    for part in path[:-1]:
        section = section and _below(section, part)
    return _kinds(section, path[-1]) if section else set()


def _kinds(section: type[BaseModel], name: int | str) -> set[Any]:
    """The types that a field of a section may hold; none where it has no such field."""
    field = section.model_fields.get(str(name))
    options = () if field is None else get_args(field.annotation) or (field.annotation,)
    return {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in options}
