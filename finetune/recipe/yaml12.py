"""YAML 1.2 with unique keys: 1e-4 is a number, 0100 is a hundred and 12:30 is a text.

PyYAML's YAML 1.1 reads these as a text, 64 and 750.
"""

import re
from typing import Any

import yaml

NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
"""Patterns of plain scalars that are numbers (YAML 1.2.2, section 10.3.2), integers first."""

YAML_1_1_ONLY = (*NUMBERS, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
"""Tags that PyYAML resolves differently from YAML 1.2."""


class Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose as PyYAML does, and check the keys."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is given twice",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Read a whole number, whatever its leading zeros."""
        text = str(self.construct_scalar(node))
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class Dumper(yaml.SafeDumper):
    """Safe YAML that :class:`Loader` and readers of YAML 1.1 read alike."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rows if tag not in YAML_1_1_ONLY]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_int)
for tag, pattern in NUMBERS.items():
    yaml.add_implicit_resolver(
        tag, re.compile(rf"^(?:{pattern})$"), list("-+.0123456789"), Loader=Loader, Dumper=Dumper
    )
