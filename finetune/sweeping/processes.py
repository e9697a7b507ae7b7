"""Child processes that end when this one does, however it ends.

Each child watches its standard input, a pipe that this process alone holds open: the system closes
it when this process exits, is interrupted or killed.
"""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

BAR_SECONDS = "5"
"""The seconds between two states of a progress bar in a log."""

TAIL_BYTES = 5000
"""The length of a log's end that is read for progress and errors."""

GRACE_S = 30
"""The seconds that a child has to end by itself."""

LINE_ENDS = re.compile(r"[\r\n]+")
PROGRESS = re.compile(r"([\w ]+): +(\d+%)")


class Children:
    """Running children, that can be ended together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def run(
        self, module: str, arguments: Sequence[str], log: Path, cores: Sequence[int] | None = None
    ) -> int:
        """Run a module as a child until it ends.

        Args:
            module: the module, as after ``python -m``. It ends when its standard input does.
            arguments: its command line.
            log: the file that its output is appended to.
            cores: the processor cores that it may use; ``None``: all.

        Returns:
            The exit status; negative if a signal ended the child, or :meth:`end` was called.
        """
        command = [sys.executable, "-m", module, *arguments]
        with log.open("ab") as output:
            with self._lock:
                if self._ended:
                    return -1
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"TQDM_MININTERVAL": BAR_SECONDS},
                    start_new_session=True,  # Ctrl-C reaches it through its input, once
                )
                self._running.add(child)
            if cores:  # before the child's libraries start threads, which inherit it
                os.sched_setaffinity(child.pid, cores)
            status = child.wait()
        with self._lock:
            self._running.discard(child)
            assert child.stdin is not None
            child.stdin.close()
        return status

    @property
    def ended(self) -> bool:
        """True once :meth:`end` was called."""
        return self._ended

    def end(self) -> None:
        """End all children, and start no others."""
        with self._lock:
            self._ended = True
            running = list(self._running)
            for child in running:
                assert child.stdin is not None
                child.stdin.close()
        for child in running:
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()


def share_cores(slot: int, slots: int) -> list[int] | None:
    """Choose the processor cores of one of several children; ``None``: all, for a single one."""
    if slots == 1:
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores[slot::slots] or [cores[slot % len(cores)]]


def read_progress(log: Path) -> str:
    """Read from a log how far a child is, such as ``Stage 1 40%``; empty if it does not say."""
    found = PROGRESS.findall(_read_tail(log))
    return " ".join(found[-1]).strip() if found else ""


def read_reason(log: Path) -> str:
    """Read from a log why a child failed: the first sentence of its error, or its last line."""
    lines = [line.strip() for line in LINE_ENDS.split(_read_tail(log)) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    last = (errors or lines or ["it printed nothing"])[-1].removeprefix("error: ")
    return re.split(r"(?<=\.)\s", last, maxsplit=1)[0]


def _read_tail(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")
