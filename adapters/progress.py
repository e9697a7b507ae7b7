"""Progress bars for those who watch, and lines for logs."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

_shown = {"in files": False}


def show_in_files() -> None:
    """Write bars into files too, for a program that reads them there."""
    _shown["in files"] = True


def is_watched() -> bool:
    """Tell whether anyone sees bars: in a terminal or a notebook, or by :func:`show_in_files`."""
    return _shown["in files"] or issubclass(tqdm, tqdm_notebook) or sys.stderr.isatty()


if TYPE_CHECKING:
    Bar = tqdm  # the same to its users
else:

    class Bar(tqdm):
        """A progress bar; none where standard error is a file and each state were another line."""

        def __init__(self, *given: Any, **options: Any) -> None:
            options.setdefault("disable", not is_watched())
            super().__init__(*given, **options)


def say(line: str) -> None:
    """Print a line on standard output, above any bar, and before the process goes on."""
    tqdm.write(line)
    sys.stdout.flush()


@contextmanager
def timed(what: str, *, shown: bool = True) -> Iterator[None]:
    """Say once a block has succeeded how long it took.

    Args:
        what: the block, as the line begins.
        shown: say it; ``False`` on all processes but one.
    """
    started = time.perf_counter()
    yield
    if shown:
        say(f"{what}: {format_seconds(time.perf_counter() - started)}")


def format_seconds(seconds: float) -> str:
    """Format a duration for a sentence.

    Example:
        >>> from adapters.progress import format_seconds
        >>> format_seconds(75)
        '1 min 15 s'
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) <= 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


class Pace:
    """The rate of a loop over steps, without the time that other work takes.

    Args:
        first: the number of steps that are done already.
        steps: the number of all steps.
    """

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.steps = first, steps
        self.started, self.skipped_s = time.perf_counter(), 0.0

    def skip(self, seconds: float) -> None:
        """Leave out time that was not spent on steps."""
        self.skipped_s += seconds

    @property
    def seconds(self) -> float:
        """The seconds that the steps have taken so far."""
        return time.perf_counter() - self.started - self.skipped_s

    def describe(self, step: int) -> str:
        """Describe how far the loop is, such as ``40%, step 4 of 10, 2.0 steps/s, 3.0 s left``."""
        done, seconds = step - self.first, max(self.seconds, 1e-9)
        left = format_seconds((self.steps - step) * seconds / done) if done else "?"
        rate = f"{done / seconds:.3g} steps/s"
        share = f"{100 * step // self.steps}%"
        return f"{share}, step {step:,} of {self.steps:,}, {rate}, {left} left"
