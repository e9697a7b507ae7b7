"""The version, the error that a person is meant to read, and names in its sentences."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from pydantic import AfterValidator
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend, in one sentence: what, where, expected, found, what to do.

    Command lines print it without a traceback and exit with status 2.
    """


@contextmanager
def command_line() -> Iterator[None]:
    """Run a command: our own progress bars only, and mistakes as sentences on standard error."""
    import datasets
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except UserError as error:
        tqdm.write(f"error: {error}", file=sys.stderr)  # not into an open progress bar
        raise SystemExit(2) from None
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        advice = "take fewer pictures at a time, or a precision of nf4"
        tqdm.write(f"error: {reason}: {advice}.", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        sentence = f"The system refused ({reason}); mend that, and try again."
        tqdm.write(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        tqdm.write("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


__version__ = "0.1.0"


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Names in a sentence; of more than ``limit``, how many more."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def closest(word: str, names: Sequence[str]) -> str:
    """A hint at the valid name that a word was probably meant to be."""
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(names)}"


def name_in(table: Mapping[str, object]) -> AfterValidator:
    """A pydantic validator: the name of a row, or an error that hints at the closest."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown name {name!r}; {closest(name, list(table))}")
        return name

    return AfterValidator(check)
