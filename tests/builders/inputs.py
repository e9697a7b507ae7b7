"""Tables of input that a user may give, and how each must end."""

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.builders.commands import refusal

SECONDS = 10
"""The most that a refusal may take of the processor's time."""
MEGABYTES = 500
"""The most that a refusal may add to the process's memory."""


@dataclass(frozen=True)
class Refused:
    """Input that ends in one sentence."""

    name: str
    """The case in words, which is the test's name."""
    arrange: Callable[[Path], Sequence[object]]
    """Writes the input into an empty folder, and returns the command's arguments."""
    says: Sequence[str]
    """What the sentence must hold: file or field, what was expected, found, and what to do."""


def check_refused(
    case: Refused,
    main: Callable[[list[str]], None],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check that a command refuses a case as it should, soon, and leaves nothing behind."""
    arguments = case.arrange(folder)
    files = sorted(folder.rglob("*"))
    started, memory = time.process_time(), peak_megabytes()
    sentence = refusal(capsys, main, *arguments)
    assert [part for part in case.says if part not in sentence] == [], sentence
    assert sorted(folder.rglob("*")) == files
    assert time.process_time() - started < SECONDS
    assert peak_megabytes() - memory < MEGABYTES


def peak_megabytes() -> float:
    """Return the most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
