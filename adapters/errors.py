"""The one error that a person is meant to read."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend, in one sentence: what, where, expected, found, what to do.

    Command lines print it without a traceback and exit with status 2.
    """


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a :class:`UserError` of the block on standard error and exit with status 2."""
    try:
        yield
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
