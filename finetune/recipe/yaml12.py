"""YAML 1.2 with unique keys: 1e-4 is a number, 0100 is a hundred, 12:30 and yes are texts.

PyYAML's YAML 1.1 reads these as a text, 64, 750 and true. Only the types of the core schema are
read, and neither size, nor depth, nor what aliases expand to is without bounds.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import yaml
from yaml.reader import ReaderError

from adapters.errors import quote

CORE = "tag:yaml.org,2002:"
"""The beginning of the tags of YAML's own types."""

PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        "float": (
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
            r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        "bool": r"true|True|TRUE|false|False|FALSE",
    }
)
"""Patterns of plain scalars that are not texts (YAML 1.2.2, section 10.3.2), integers first."""

YAML_1_1_ONLY = {CORE + name for name in (*PATTERNS, "timestamp", "value")}
"""Tags that PyYAML resolves differently from YAML 1.2."""

TYPES = {CORE + name for name in (*PATTERNS, "null", "str", "seq", "map")}
"""The tags of the core schema."""

MOST_LETTERS = 2**21
"""The most letters of a text that is read; a recipe with ten thousand prompts has fewer."""

MOST_VALUES = 100_000
"""The most values of a text, those that aliases repeat included."""

MOST_DEPTH = 40
"""The most sections and lists within one another; a recipe has six."""

MOST_DIGITS = 40
"""The most letters of a whole number, far beyond all that a field takes."""


def read_yaml(text: str) -> Any:
    """Read a YAML text.

    Raises:
        ValueError: with the reason in one line, such as ``line 3, column 5: ...``.
    """
    if len(text) > MOST_LETTERS:
        raise ValueError(f"it has {len(text):,} letters, more than {MOST_LETTERS:,}")
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(_explain(error, text)) from error
    except (ValueError, ArithmeticError) as error:  # of an escape beyond all characters
        raise ValueError(f"it has an escape or directive out of range ({error})") from error


def _explain(error: yaml.YAMLError, text: str) -> str:
    """Say in one line where and what is wrong with a text."""
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: the character U+{int(error.character):04X} is not allowed"
    assert isinstance(error, yaml.MarkedYAMLError)
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + ", ".join(filter(None, (error.context, error.problem)))


class Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, and everything has bounds."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._values = 0
        self._sizes: dict[yaml.Node | None, int] = {}
        """The number of values in each whole node, with what its aliases stand for."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose as PyYAML does, within bounds."""
        event, before = self.peek_event(), self._values
        is_alias = isinstance(event, yaml.AliasEvent)
        self._depth += isinstance(event, yaml.CollectionStartEvent)
        if self._depth > MOST_DEPTH:
            raise _mistake(f"more than {MOST_DEPTH} lists and sections within one another", event)
        node = super().compose_node(parent, index)
        self._depth -= isinstance(event, yaml.CollectionStartEvent)
        if is_alias and node not in self._sizes:
            raise _mistake("an alias within the value that it stands for", event)
        self._values += self._sizes[node] if is_alias else 1
        if self._values > MOST_VALUES:
            raise _mistake(f"more than {MOST_VALUES:,} values, with those of aliases", event)
        self._sizes.setdefault(node, self._values - before)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose as PyYAML does, and check the keys."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _mistake(f"the key {quote(key.value)} is given twice", key)
                seen.add(key.value)
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Read a whole number, whatever its leading zeros."""
        text = self._take("int", node)
        if len(text) > MOST_DIGITS:
            raise _mistake(f"a number of {len(text):,} digits, more than {MOST_DIGITS}", node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        """Read a number."""
        text = self._take("float", node).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        """Read true or false."""
        return self._take("bool", node).lower() == "true"

    def construct_unknown(self, node: yaml.Node) -> None:
        """Refuse a value of any other type."""
        raise _mistake(
            f"the tag {quote(node.tag.replace(CORE, '!!'))} is of no type used here", node
        )

    def _take(self, name: str, node: yaml.ScalarNode) -> str:
        """Return a scalar's text, once it is found to be of a type, as it may be tagged at will."""
        text = str(self.construct_scalar(node))
        if not re.fullmatch(PATTERNS[name], text):
            raise _mistake(f"{quote(text)} is no {name}", node)
        return text


def _mistake(problem: str, place: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = place.start_mark  # PyYAML's own, where its types also know libyaml's
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


class Dumper(yaml.SafeDumper):
    """Safe YAML that :class:`Loader` and readers of YAML 1.1 read alike."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rows if tag not in YAML_1_1_ONLY]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for name, pattern in PATTERNS.items():
    yaml.add_implicit_resolver(
        CORE + name,
        re.compile(rf"^(?:{pattern})$"),
        list("-+.0123456789tTfF"),
        Loader=Loader,
        Dumper=Dumper,
    )
CONSTRUCTORS: dict[Any, Any] = {
    tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag in TYPES
}
"""The functions that make values, by tag; ``None``: of all other types."""

Loader.yaml_constructors = CONSTRUCTORS | {
    CORE + "int": Loader.construct_int,
    CORE + "float": Loader.construct_float,
    CORE + "bool": Loader.construct_bool,
    None: Loader.construct_unknown,
}
