"""Lists of prompts, shipped or a user's own, and the names of the subject in them."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from adapters.arguments import expand_home
from adapters.errors import UserError, closest, quote
from adapters.text_files import read_text

LISTS = MappingProxyType(
    {file.stem: file for file in sorted(Path(__file__).with_name("prompts").glob("*.txt"))}
)
"""The files of the shipped lists, by name."""

MOST_BYTES = 2**20
"""The size above which a list is not read; ten thousand captions have less."""

SUBJECT = "{}"
"""The place of the subject's name in a prompt."""


NAMES_IN: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "data": {"prompt": "identifier"},
        "prior": {"prompts": "subject"},
        "validation": {
            "prompts": "identifier",
            "stage_2_prompts": "subject",
            "other_prompts": "identifier",
        },
        "evaluation": {
            "prompts": "identifier",
            "stage_2_prompts": "subject",
            "other_prompts": "identifier",
            "class_prompts": "subject",
        },
    }
)
"""The fields of a recipe that hold prompts, by section, each with the field of ``evaluation`` whose
words are put in for ``{}``."""

Filled = TypeVar("Filled", str, tuple[str, ...], None)


def put_in(words: str, prompts: Filled) -> Filled:
    """Put the subject's name in for ``{}`` in a prompt, or in several."""
    if isinstance(prompts, str):
        return prompts.replace(SUBJECT, words)
    return prompts and tuple(prompt.replace(SUBJECT, words) for prompt in prompts)


def read_prompts(name: str) -> tuple[str, ...]:
    """Read a list of prompts, one a line; empty lines and lines that begin with ``#`` are left out.

    Args:
        name: the name of a shipped list, or the path of a file that ends in ``.txt``.

    Raises:
        ValueError: if there is no such list, or the file cannot be read or has no prompts.
    """
    try:
        file = expand_home(name) if name.endswith(".txt") else LISTS.get(name)
    except UserError as error:
        raise ValueError(str(error)) from None
    if file is None:
        raise ValueError(
            f"unknown list {quote(name)}; {closest(name, list(LISTS))}; or name a .txt file"
        )
    try:
        text = read_text(file, MOST_BYTES)
    except ValueError as error:
        raise ValueError(f"the list {name} cannot be read ({error})") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise ValueError(f"the list {name} has no prompts")
    return prompts
