"""A Sphinx extension: directives for the parts of pages that are made from the code."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from finetune.recipe.reference import Key, KeySection, list_sections

ROOT = Path(__file__).parent.parent

SHOWN_PATHS = 2
"""The most sections with the same keys whose paths are written out."""


class RecipeKeys(SphinxDirective):
    """Describes every section of a recipe, and every key with its type, range and default."""

    def run(self) -> list[nodes.Node]:
        """Return a section of the page for each section of a recipe."""
        seen: set[str] = set()
        text = "\n".join(line for section in list_sections() for line in describe(section, seen))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class Dependencies(SphinxDirective):
    """Lists the packages that are required: from which version on, and which is installed."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        table = ["| package | from | tested with |", "|---|---|---|"]
        table += [f"| {' | '.join(row)} |" for row in list_dependencies()]
        return self.parse_text_to_nodes("\n".join(table))


def list_dependencies() -> Iterator[tuple[str, str, str]]:
    """Yield each required package: its name, the oldest version that may do, and the pinned one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {name.lower(): version for name, version in (line.split("==") for line in lines)}
    for requirement in project["dependencies"]:
        name, _, oldest = requirement.partition(">=")
        yield name, oldest or "any", pinned[name.lower()]


def describe(section: KeySection, seen: set[str]) -> Iterator[str]:
    """Describe a section and its keys, as MyST.

    Args:
        section: the section.
        seen: the paths of the keys so far, to which its own are added; those of a second kind of
            a section are not indexed again.
    """
    kind = next((key.type for key in section.keys if key.name == "kind"), "")
    of_kind = f", kind: {kind}" if section.label == "prior" else ""
    yield f"## {f'`{section.label}`{of_kind}' if section.label else 'Top level'}\n"
    yield to_markdown(section.text) + "\n"
    paths = section.paths if len(section.paths) <= SHOWN_PATHS else [section.label]
    if paths != section.paths:
        yield f"The same in {', '.join(f'`{path}`' for path in section.paths)}.\n"
    for key in section.keys:
        names = [f"{path}.{key.name}" if path else key.name for path in paths]
        yield from describe_key(key, names, indexed=seen.isdisjoint(names))
        seen.update(names)


def describe_key(key: Key, names: list[str], *, indexed: bool) -> Iterator[str]:
    """Describe a key, which stands at each of its full names, as MyST."""
    first, *others = names
    yield f":::{{confval}} {first}"
    yield from others
    yield f":type: {key.type}"
    if key.default is not None:
        plain = " " in key.default and "{" not in key.default  # in words, not a value
        yield f":default: {key.default if plain else f'`{key.default}`'}"
    if not indexed:
        yield ":no-index:"
    yield f"\n{to_markdown(key.text)}\n:::\n"


def to_markdown(text: str) -> str:
    """Rewrite a docstring's reStructuredText as Markdown, and Python's words as YAML's."""
    return re.sub(r":\w+:`([^`]+)`", r"``\1``", text).replace("``None``", "``null``")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the directives."""
    app.add_directive("recipe-keys", RecipeKeys)
    app.add_directive("dependencies", Dependencies)
    return {"parallel_read_safe": True}
