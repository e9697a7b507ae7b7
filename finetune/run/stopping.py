"""Requests to stop a run: a signal, or the end of the launcher that started it.

In the steps of training a request waits for the end of the step, so that a checkpoint can be saved;
everywhere else it interrupts what is being done, as all of that is kept piece by piece or is made
again within minutes.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that ask for an end: of a scheduler or ``kill``, of Ctrl-C, of a closed terminal."""

FORWARDED_S = 1.0
"""The seconds within which a second Ctrl-C is the first one, forwarded by the launcher."""

STOP_WITHIN_S = 120.0
"""The seconds that a process has to stop before it is ended."""

STOP_TOGETHER_S = 25.0
"""The same for one of several processes, whose launcher kills them after 30 s: a process that waits
for another that is gone would never stop."""

SAYS_WITHIN_S = 2.0
"""The seconds in which the last sentence is printed, or is not."""

LOOK_EVERY_S = 1.0
"""The seconds between two looks at the launcher."""

LAUNCHER_ENDS_S = 1.5
"""The seconds that a launcher has to end after a Ctrl-C."""

LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Variables that Accelerate's launcher and PyTorch's set for the processes that they start."""

LAUNCHERS = (b"accelerate", b"torch")
"""A part of the command line of each of these launchers."""


class StoppedError(BaseException):
    """A run that was asked to stop; not an ``Exception``, which libraries might catch.

    Args:
        number: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)

    @property
    def status(self) -> int:
        """The exit status, as shells have it: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.signal


class Stop:
    """The request to stop, if there is one."""

    def __init__(self) -> None:
        self.signal = 0
        """The number of the signal that asked first; 0: none has."""
        self._waits = False
        self._raised = False

    def check(self) -> None:
        """Raise a StoppedError if there is a request."""
        if self.signal:
            self._raised = True
            raise StoppedError(self.signal)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Have requests wait until the end of the block, which looks at :attr:`signal`."""
        with self._waiting(True):
            yield
        self.check()

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Have requests interrupt the block, inside of one in which they wait."""
        with self._waiting(False):
            self.check()  # for one that has waited
            yield

    @contextmanager
    def _waiting(self, waits: bool) -> Iterator[None]:
        before, self._waits = self._waits, waits
        try:
            yield
        finally:
            self._waits = before

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Take a request, in the main thread."""
        self.signal = self.signal or number
        if not self._waits and not self._raised:  # a second one must not interrupt the end
            self.check()


@contextmanager
def heed_signals(say: Callable[[str], object]) -> Iterator[Stop]:
    """Take the signals of this process as requests to stop while the block runs.

    Signals that this process was started to ignore stay ignored, such as SIGHUP under ``nohup``. A
    second Ctrl-C ends the process at once, and so does a request that is not met in time.

    Args:
        say: prints the sentence with which a process is ended at once.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield stop
        return
    heeded = [each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {each: signal.signal(each, stop.handle) for each in heeded}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watch = threading.Thread(target=_Watch(stop, say).run, args=(reading,), daemon=True)
    watch.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for each, handler in before.items():
            signal.signal(each, handler)
        os.close(writing)
        watch.join()
        os.close(reading)


class _Watch:
    """A thread that sees signals, and the end of the launcher, whatever the main thread waits for.

    A handler runs only between two steps of the interpreter, so not while the main thread waits for
    a device or another process.
    """

    def __init__(self, stop: Stop, say: Callable[[str], object]) -> None:
        self.stop, self.say = stop, say
        self.first: int | None = None
        """The number of the first signal."""
        self.since = 0.0
        """The time of the first signal."""
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.patience_s = STOP_TOGETHER_S if several else STOP_WITHIN_S
        self.launcher = find_launcher()

    def run(self, signals: int) -> None:
        """Watch until the pipe of signals is closed."""
        while True:
            if select.select([signals], [], [], LOOK_EVERY_S)[0]:
                numbers = os.read(signals, 100)
                if not numbers:
                    return
                for number in numbers:
                    self.see(number)
            if self.first is None and self.launcher not in (None, os.getppid()):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                self.see(signal.SIGTERM)
            if self.first is not None and time.monotonic() > self.since + self.patience_s:
                self.end(f"did not stop within {self.patience_s:.0f} s")

    def see(self, number: int) -> None:
        """Note a signal; a second Ctrl-C ends the process."""
        if number not in SIGNALS:
            return
        now = time.monotonic()
        if self.first is None:
            self.first, self.since = number, now
        elif number == signal.SIGINT and now > self.since + FORWARDED_S:
            self.end("stopped at once")

    def end(self, how: str) -> None:
        """End the process, without anything further."""
        assert self.first is not None
        # aside, as the main thread may hold what printing needs
        saying = threading.Thread(target=self.say, args=(how,), daemon=True)
        saying.start()
        saying.join(SAYS_WITHIN_S)
        os._exit(128 + self.first)


def find_launcher() -> int | None:
    """Return the number of the process that launched this one; ``None``: it was not launched.

    If the launcher has ended already, the result is 0, which no process has.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return None
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        # a launcher that is gone leaves its children to a process of another session
        if os.getsid(parent) != os.getsid(0) and not any(name in command for name in LAUNCHERS):
            return 0
    except OSError:  # without /proc, or gone this moment: getppid() tells the rest
        pass
    return parent


def wait_for_launcher() -> None:
    """Wait for the launcher of a single process to end, which it does soon after a Ctrl-C."""
    launcher = find_launcher()
    if launcher is None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    deadline = time.monotonic() + LAUNCHER_ENDS_S
    while os.getppid() == launcher and time.monotonic() < deadline:
        time.sleep(0.05)
