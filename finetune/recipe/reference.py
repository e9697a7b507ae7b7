"""Every key of a recipe with its type, range, default and text, as the schema has them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import BaseModel

from finetune.recipe.schema import Recipe

Schema: TypeAlias = Mapping[str, Any]
"""A part of a JSON schema, as pydantic writes it."""

WORDS = {
    "string": ("text", "texts"),
    "integer": ("whole number", "whole numbers"),
    "number": ("number", "numbers"),
    "boolean": ("true or false", "true or false"),
    "null": ("null", "null"),
    "object": ("section", "sections"),
}
"""The names of JSON's types for readers of YAML: of one value, and of several."""

BOUNDS = {
    "minItems": "at least {}",
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
"""The bounds of a JSON schema in words."""

ENDLESS = 10**9
"""The upper bound from which it goes without saying."""

LARGE = 2**20
"""The bound from which whole numbers are written as powers of two."""


@dataclass(frozen=True)
class Key:
    """A key of a section."""

    name: str
    type: str
    """Its type and range in words, with values in backquotes."""
    default: str | None
    """Its default as YAML writes it on one line, or in words; ``None``: it must be given."""
    text: str
    """Its meaning, in reStructuredText."""


@dataclass
class KeySection:
    """A section of a recipe, or several that have the same keys."""

    title: str
    """The name of its class."""
    text: str
    """Its description, in reStructuredText."""
    keys: Sequence[Key]
    paths: list[str] = field(default_factory=list)
    """Its place, dotted; empty for the recipe itself."""

    @property
    def label(self) -> str:
        """Its paths as one, in which ``*`` stands for what differs."""
        parts = [
            dict.fromkeys(each) for each in zip(*(p.split(".") for p in self.paths), strict=True)
        ]
        return ".".join(_merge(list(each)) for each in parts)


def list_sections(root: type[BaseModel] = Recipe) -> list[KeySection]:
    """List the sections of a recipe, each once, in the order of the schema.

    Example:
        >>> [section.label for section in list_sections()][:3]
        ['', 'base', 'data']
    """
    schema = root.model_json_schema()
    found: dict[str, KeySection] = {}
    _collect(root.__name__, "", schema, schema["$defs"], found)
    return list(found.values())


def list_paths(root: type[BaseModel] = Recipe) -> list[str]:
    """List the dotted paths of all keys, those of sections included.

    Example:
        >>> "stage_1.optimizer.learning_rate" in list_paths()
        True
    """
    return [
        f"{path}.{key.name}" if path else key.name
        for section in list_sections(root)
        for path in section.paths
        for key in section.keys
    ]


def _collect(
    title: str, path: str, schema: Schema, definitions: Schema, found: dict[str, KeySection]
) -> None:
    """Add a section, and then those below it, by the names of their classes."""
    properties, needed = schema["properties"], schema.get("required", ())
    if title not in found:
        keys = [
            Key(
                name,
                describe_type(own),
                None if name in needed else _describe_default(own, definitions),
                own.get("description", ""),
            )
            for name, own in properties.items()
        ]
        text = schema.get("description", "").partition("\n\nRaises")[0]
        found[title] = KeySection(title, text, keys)
    found[title].paths.append(path)
    for name, own in properties.items():
        for below in _references(own):
            at = f"{path}.{name}" if path else name
            _collect(below, at, definitions[below], definitions, found)


def describe_type(schema: Schema) -> str:
    """Describe a part of a JSON schema in the words of a reader of YAML.

    Example:
        >>> describe_type({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
        'whole number (at least 1) or null'
    """
    *first, last = dict.fromkeys(_alternatives(schema))
    return f"{', '.join(first)} or {last}" if first else last


def _alternatives(schema: Schema) -> Iterator[str]:
    """Yield a description of each kind of value that is allowed."""
    for option in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        yield from _alternatives(option)
    if "$ref" in schema:
        yield WORDS["object"][0]
    elif "const" in schema:
        yield f"`{schema['const']}`"
    elif "enum" in schema:
        yield from (f"`{value}`" for value in schema["enum"])
    elif schema.get("type") == "array":
        yield _describe_list(schema)
    elif "type" in schema:
        yield WORDS[schema["type"]][0] + _describe_bounds(schema)


def _describe_list(schema: Schema) -> str:
    """Describe a list: its length if that is fixed, or the least; and its items, all of a type."""
    places = schema.get("prefixItems")
    items = places[0] if places else schema["items"]
    bounds = items if places else {**schema, **items}
    count = f"{len(places)} " if places else ""
    return f"list of {count}{WORDS[items['type']][1]}{_describe_bounds(bounds)}"


def _describe_bounds(schema: Schema) -> str:
    """Write the bounds of a number or of a list's length, or the pattern of a text, in brackets."""
    schema = {k: v for k, v in schema.items() if k != "maximum" or v < ENDLESS}
    if "minimum" in schema and "maximum" in schema:
        return f" ({schema['minimum']:g} to {schema['maximum']:g})"
    words = [text.format(_number(schema[name])) for name, text in BOUNDS.items() if name in schema]
    if "pattern" in schema:
        words.append(f"of the form `{schema['pattern']}`")
    return f" ({', '.join(words)})" if words else ""


def _number(value: float) -> str:
    power = int(value).bit_length() - 1
    return f"2^{power}" if value >= LARGE and value == 2**power else f"{value:g}"


def _describe_default(schema: Schema, definitions: Schema) -> str:
    """Write a default on one line; of a section, only if it differs from its keys' own."""
    default = schema.get("default")
    if isinstance(default, Mapping):
        (name,) = _references(schema)
        properties = definitions[name]["properties"]
        if all(value == properties[key].get("default") for key, value in default.items()):
            return "its keys' defaults"
    return _as_yaml(default)


def _as_yaml(value: Any) -> str:
    """Write a value on one line; keys without a value are left out."""
    if isinstance(value, Mapping):
        given = {name: each for name, each in value.items() if each is not None}
        return "{" + ", ".join(f"{name}: {_as_yaml(each)}" for name, each in given.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _references(schema: Schema) -> Iterator[str]:
    """Yield the names of the sections that a key may hold."""
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    for option in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        yield from _references(option)


def _merge(parts: Sequence[str]) -> str:
    """Write a part of several paths: its name, or ``*`` for what differs at its end."""
    if len(parts) == 1:
        return parts[0]
    stems = {part.rpartition("_")[0] for part in parts}
    return f"{stems.pop()}_*" if len(stems) == 1 and "" not in stems else "*"
