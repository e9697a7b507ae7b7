"""YAML as people write it: keys once, and 1e-4 a number."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """PyYAML's own, and a look at the keys."""
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


class Dumper(yaml.SafeDumper):
    """Safe YAML that :class:`Loader` reads as it was meant."""


# YAML 1.2 reads 1e-4 as a number; PyYAML, which is YAML 1.1, as text
yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
    Loader=Loader,
    Dumper=Dumper,
)
