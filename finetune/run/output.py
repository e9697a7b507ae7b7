"""Standard output and error that may go away while a run goes on."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any


class LastingStream:
    """A stream whose text goes nowhere once it can no longer be written.

    A terminal is closed, the ``tee`` of a pipe is interrupted, the disk of a log is full: none of
    these is a reason to end a run.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or lose it."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Write what has been held back, or lose it."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Send all further text to nowhere, and with it what the stream holds back."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Keep errors of standard output and error from ending the block."""
    out: Any = LastingStream(sys.stdout)
    error: Any = LastingStream(sys.stderr)
    with redirect_stdout(out), redirect_stderr(error):
        yield
        out.flush()
        error.flush()
