"""Reading of recipes: the file, overrides from the command line, and mistakes in words."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from adapters.arguments import expand_home
from adapters.errors import UserError, closest, hint, quote
from adapters.mistakes import WHOLE, describe_expected, describe_found, list_mistakes
from adapters.text_files import read_text
from finetune.recipe.key_search import locate
from finetune.recipe.schema import Recipe, Section
from finetune.recipe.yaml12 import MOST_DEPTH, MOST_LETTERS, read_yaml

Place: TypeAlias = tuple[int | str, ...]
"""The path of a key or value: names of keys, and places in lists."""

OTHER_TOKENS = (
    *(yaml.AnchorToken, yaml.AliasToken, yaml.TagToken),
    *(yaml.DirectiveToken, yaml.DocumentStartToken, yaml.DocumentEndToken),
)
"""The YAML tokens that name a value or its type, or are about a whole document."""

RENAMED = {"comparison": "evaluation"}
"""The new names of keys, by their old paths."""

LONGEST_PATH = 100
"""The most letters of a key's path that a message shows."""

LONGEST_ROW = 600
"""The most letters of a mistake that a message shows."""

AnySection = TypeVar("AnySection", bound=Section)


class MistakesError(UserError):
    """The mistakes in a file: one in the sentence, several in a row each."""

    def __init__(self, title: str, rows: list[str]) -> None:
        self.rows = rows
        """Each mistake: its path, and the values expected and found."""
        super().__init__(f"{title} has {list_mistakes(rows)}")


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: ``dotted.key=value`` pairs that replace the file's values. A text field takes the
            value letter for letter (``null``: none, if allowed); other fields read it as YAML.

    Raises:
        UserError: with every mistake and its path: unknown keys and names (with the closest valid
            one), wrong types, values out of range, and sections that do not go together.
    """
    tree = read_mapping(path, f"The recipe {path}")
    for override in overrides:
        tree = _override(tree, override)
    return check_section(Recipe, tree, f"The recipe {path}")


def is_override(text: str) -> bool:
    """Tell whether a text sets a value of a recipe, rather than naming a file or folder.

    Example:
        >>> is_override("evaluation.pictures_per_prompt=2"), is_override("runs/dog/adapters=0.5")
        (True, False)
    """
    dotted, equals, _ = text.partition("=")
    section = dotted.partition(".")[0]
    return bool(equals) and section in Recipe.model_fields and not Path(dotted).exists()


def read_mapping(path: str | Path, title: str) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Args:
        path: the file.
        title: the file in messages, such as ``The recipe dog.yaml``.

    Raises:
        UserError: if it cannot be read, or is something else.
    """
    try:
        text = read_text(
            expand_home(path), most_bytes=4 * MOST_LETTERS
        )  # a letter has 1 to 4 bytes
    except ValueError as error:
        raise UserError(f"{title} cannot be read: {error}.") from error
    try:
        tree = read_yaml(text)
    except ValueError as error:
        raise UserError(f"{title} is not valid YAML: {error}.") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"{title} must be a YAML file of keys and values (got"
            f" {'nothing' if tree is None else quote(tree)})."
        )
    return tree


def check_section(kind: type[AnySection], tree: dict[str, Any], title: str) -> AnySection:
    """Check the keys and values of a whole file.

    Raises:
        MistakesError: with all mistakes.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise MistakesError(title, _explain(error, kind)) from None


def _override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    """Replace one value in a copy; other places that share it by a YAML alias keep theirs."""
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.split(".")
    if not (dotted and equals):
        raise UserError(f"An override must be key=value (got {quote(override)}).")
    if len(sections) > MOST_DEPTH:
        raise UserError(
            f"The override {quote(override)} sets an unknown key; name one of a recipe."
        )
    types = _types_at((*sections, key), Recipe)
    is_text = str in types and types <= {str, NoneType}
    literal = is_text and not (text == "null" and NoneType in types)
    tree = node = dict(tree)
    for section in sections:
        below = node.get(section)
        if not isinstance(below, dict | None):
            raise UserError(
                f"The override {quote(override)} takes the value {quote(section)} for a section."
            )
        node[section] = below = dict(below or {})
        node = below
    node[key] = text if literal else parse_value(text, f"override {quote(override)}")
    return tree


def parse_value(text: str, origin: str) -> Any:
    """Read a value as YAML, provided that YAML reads all of its text as the value.

    Args:
        text: the value.
        origin: where it stands, for messages, such as ``override 'seed=1'``.

    Raises:
        UserError: if it is not valid YAML, or YAML skips or interprets a part of it.
    """
    try:
        value = read_yaml(text)
        tokens = [t for t in yaml.scan(text) if not isinstance(t, yaml.StreamEndToken)]
    except ValueError as error:
        raise UserError(
            f"The value of the {origin} is not valid YAML ({error}): texts within it that contain"
            " any of : # & * ! [ ] { } , must be in quotes."
        ) from error
    rest = text[tokens[-1].end_mark.index :].strip()
    named = [
        text[token.start_mark.index : token.end_mark.index]
        for token in tokens
        if isinstance(token, OTHER_TOKENS)
    ]
    if rest or named:
        raise UserError(
            f"The {origin} contains {quote((named or [rest])[0])}, which YAML does not read as"
            " text; put the text in quotes."
        )
    return value


def _explain(error: ValidationError, root: type[Section]) -> list[str]:
    """Write one line for each mistake: its path, and the values expected and found."""
    rows = []
    found = [(_path(mistake["loc"], root), mistake) for mistake in error.errors(include_url=False)]
    for _, field in groupby(found, lambda pair: [p for p in pair[0] if isinstance(p, str)]):
        mistakes: dict[Place, list[ErrorDetails]] = {}
        for path, mistake in field:
            mistakes.setdefault(path, []).append(mistake)
        deepest = max(map(len, mistakes))  # of a union's branches, the one that got furthest
        rows += [_row(*pair, root) for pair in mistakes.items() if len(pair[0]) == deepest]
    return rows


def _row(path: Place, mistakes: list[ErrorDetails], root: type[Section]) -> str:
    """Describe a place's mistake, or its mistakes in each branch of a union."""
    first = mistakes[0]
    message = describe_expected(first)
    if first["type"] == "extra_forbidden":
        message = _explain_unknown_key(path, first["loc"], root)
    elif first["type"] == "union_tag_invalid":
        kinds = [_kind(section) for section in _sections(_types_at(path, root))]
        path, found = (*path, "kind"), first["input"]["kind"]
        valid = " or ".join(map(repr, kinds))
        message = f"must be {valid}{_describe_found(found, kinds)}"
    elif first["type"] not in WHOLE:
        others = [describe_expected(mistake).removeprefix("must be ") for mistake in mistakes[1:]]
        message = " or ".join([message, *others])
        named = any(mistake["type"] == "literal_error" for mistake in mistakes)
        message += _describe_found(first["input"], _names_at(path, root) if named else ())
    return _cut(f"{_format_path(path)}: {message}" if path else message)


def _cut(row: str) -> str:
    return row if len(row) <= LONGEST_ROW else f"{row[:LONGEST_ROW]}…"


def _format_path(path: Place) -> str:
    """Write a path with dots; a long one, or one with odd characters, as a text in quotes."""
    dotted = ".".join(map(str, path))
    plain = dotted.isprintable() and dotted.strip() == dotted and len(dotted) <= LONGEST_PATH
    return dotted if plain and dotted else quote(dotted, LONGEST_PATH)


def _describe_found(value: Any, names: Sequence[str]) -> str:
    """Show the value that was found, as YAML writes it, and hint at the name that it is close to.

    Args:
        value: any value.
        names: those that are valid in its place, if any.
    """
    close = hint(value, names) if isinstance(value, str) else ""
    return f" {describe_found(value)}" + (f"; {close}" if close else "")


def _names_at(path: Place, root: type[Section]) -> list[str]:
    """List the names that the field at a path in a section may hold."""
    literals = (kind for kind in _types_at(path, root) if get_origin(kind) is Literal)
    return sorted(str(name) for literal in literals for name in get_args(literal))


def _explain_unknown_key(path: Place, place: Place, root: type[Section]) -> str:
    """Hint at the key that an unknown one should have been.

    Args:
        path: the unknown key's path.
        place: pydantic's place of it, which also names the kind of a section that has several.
        root: the section that the path starts in.
    """
    new = RENAMED.get(".".join(map(str, path)))
    if new:
        return f"unknown key; is now {new}"
    key, sections = str(path[-1]), _sections(_types_at(path[:-1], root))
    own = sections[0] if len(sections) == 1 else next(s for s in sections if _kind(s) == place[-2])
    others = [_kind(section) for section in sections if key in section.model_fields]
    if others:
        return f"belongs to kind: {others[0]}, but this is kind: {_kind(own)}"
    meant = locate([str(part) for part in path]) if root is Recipe else ""
    return f"unknown key; {meant or closest(key, list(own.model_fields))}"


def _path(place: Place, root: type[Section]) -> Place:
    """Drop from a place the names that pydantic gives to the branches of unions."""
    path: Place = ()
    kind_named = False
    for part in place:
        sections = _sections(_types_at(path, root))
        kinds = [_kind(each) for each in sections] if len(sections) > 1 else []
        if not kind_named and str(part) in kinds:
            kind_named = True
        elif isinstance(part, int) or sections:
            path += (part,)
            kind_named = False
    return path


def _types_at(path: Place, root: type[Section]) -> set[Any]:
    """Return the types that the field at a path in a section may hold; none without a field."""
    types: set[Any] = {root}
    for part in path:
        fields = [section.model_fields.get(str(part)) for section in _sections(types)]
        types = {kind for field in fields if field for kind in _options(field.annotation)}
    return types


def _options(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation allows."""
    if get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for option in get_args(annotation):
            yield from _options(option)
    else:
        yield annotation


def _sections(types: Iterable[Any]) -> list[type[BaseModel]]:
    """List the sections among some types, by name; several are told apart by their ``kind``."""
    classes = (kind for kind in types if isinstance(kind, type) and get_origin(kind) is None)
    sections = (kind for kind in classes if issubclass(kind, BaseModel))
    return sorted(sections, key=lambda section: section.__name__)


def _kind(section: type[BaseModel]) -> str:
    """Return the name of the kind that a section is, of those that its key can hold."""
    return str(get_args(section.model_fields["kind"].annotation)[0])
