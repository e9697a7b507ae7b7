"""The version, the error for users to read, and helpers that word its sentences."""

import difflib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function
from tqdm import tqdm

__version__ = "0.1.0"

QUOTED = 80
"""The most letters of a value that a sentence quotes."""

LONGEST = 4000
"""The most letters of a message; of a longer one, the middle is left out."""

UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters, such as of a file's name, that would steer the terminal or cannot be written."""


class UserError(Exception):
    """A mistake that the user can fix, in one sentence: place, expected, found, and remedy.

    Command lines print it without a traceback and exit with status 2. It may quote files of others,
    so it has a length that can be read, and does not steer a terminal.
    """

    def __init__(self, sentence: str) -> None:
        text = show_plainly(sentence)
        if (more := len(text) - LONGEST) > 0:
            half = LONGEST // 2
            text = f"{text[:half]} … ({more:,} letters) … {text[-half:]}"
        super().__init__(text)


@contextmanager
def command_line() -> Iterator[None]:
    """Run a command; its errors end as sentences on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of ASCII shows other letters escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        _exit(f"The system reported an error ({reason}); fix that and try again.")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's own class; importing torch is slow
            raise
        reason = str(error).partition(". ")[0]
        _exit(f"{reason}; use fewer pictures at a time, or the precision nf4.")
    except KeyboardInterrupt:
        tqdm.write("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _exit(sentence: str) -> NoReturn:
    tqdm.write(
        f"error: {show_plainly(sentence)}", file=sys.stderr
    )  # prints above an open progress bar
    raise SystemExit(2) from None


@cache
def say_loading() -> None:
    """Say that a command is about to import what takes seconds, once, to those who watch.

    Nothing is said where standard error is a file, nor by any process but the first of several.
    """
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        sys.stderr.write("Loading libraries …\n")
        sys.stderr.flush()


def quiet_libraries() -> None:
    """Import the libraries, and turn off their progress bars, as a command shows its own."""
    say_loading()
    import datasets
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@cache
def print_once(line: str) -> None:
    """Print a line on standard error, once; of several processes, only the first prints."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


def show_plainly(text: str) -> str:
    r"""Spell out characters that would steer a terminal or cannot be written, as in ``\x1b``.

    Example:
        >>> from adapters.errors import show_plainly
        >>> show_plainly("red \x1b[31m")
        'red \\x1b[31m'
    """
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """Return an error's text, of several lines the first, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def quote(value: object, limit: int = QUOTED) -> str:
    """Write a value for a sentence as Python does, of a long one only the beginning.

    Example:
        >>> from adapters.errors import quote
        >>> quote("a dog"), quote("abc" * 100, limit=8)
        ("'a dog'", "'abcabca… (300 letters)")
    """
    text = repr(value)
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(value if isinstance(value, str) else text):,} letters)"


def listed(names: Iterable[str], limit: int = 20) -> str:
    """List names for a sentence; past ``limit``, only the number of further ones."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def closest(word: str, names: Sequence[str]) -> str:
    """Hint at the valid name closest to a word, or list all of them."""
    return hint(word, names) or f"valid: {', '.join(names)}"


def hint(word: str, names: Sequence[str]) -> str:
    """Hint at the valid name closest to a word; empty if none is close."""
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""


@dataclass(frozen=True)
class NameIn:
    """A pydantic annotation of texts that are names in a table, which a schema then lists."""

    names: tuple[str, ...]

    def check(self, name: str) -> str:
        """Raise a ValueError that hints at the closest name, if a name is not in the table."""
        if name not in self.names:
            raise ValueError(f"unknown name {quote(name)}; {closest(name, self.names)}")
        return name

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(schema) | {"enum": list(self.names)}


def name_in(table: Mapping[str, object]) -> NameIn:
    """Make a pydantic annotation of a row's name, whose error hints at the closest name."""
    return NameIn(tuple(table))
