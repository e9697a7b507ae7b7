"""Signals ask a run to stop; they wait for a step, and interrupt everything else."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from finetune.run.stopping import Stop, StoppedError, heed_signals
from tests.builders import ROOT


def nothing(how: str) -> None:
    raise AssertionError(how)


def script(text: str) -> list[str]:
    """A command that runs a program, which imports no library that is slow to import."""
    imports = "import os, signal, subprocess, sys, time\nfrom finetune.run import stopping\n"
    return [sys.executable, "-c", imports + textwrap.dedent(text)]


def start(text: str, **options: object) -> subprocess.Popen[str]:
    """Start a program; interrupts reach it even if this process ignores them."""
    return subprocess.Popen(
        script(text),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,  # type: ignore[call-overload]
    )


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Signals as in a terminal, also where the tests run in the background, as with nohup."""
    own = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    own[signal.SIGINT] = signal.default_int_handler  # type: ignore[assignment]
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_interrupts_what_is_being_done(number: int, status: int) -> None:
    before = signal.getsignal(number)

    def work() -> None:
        with heed_signals(nothing):
            os.kill(os.getpid(), number)
            for _ in range(1000):  # a signal that another thread has taken ends no sleep
                time.sleep(0.01)

    with pytest.raises(StoppedError) as stopped:
        work()
    assert stopped.value.status == status
    assert signal.getsignal(number) is before


def test_a_signal_waits_for_the_end_of_a_step() -> None:
    done = []

    def work() -> None:
        with heed_signals(nothing) as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
            done.append("the step")
            with suppress(StoppedError), stop.interrupting():
                done.append("a validation")
            done.append("a checkpoint")

    with pytest.raises(StoppedError):
        work()
    assert done == ["the step", "a checkpoint"]


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with heed_signals(nothing) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_asks_a_stop_of_its_own() -> None:
    with Stop().deferred():
        pass


WORKING = """
    with stopping.heed_signals(lambda how: print(how, flush=True)) as stop, stop.deferred():
        print("at work", flush=True)
        {work}
        print("step done", flush=True)
"""


def test_a_second_interrupt_ends_the_process_at_once_and_a_forwarded_one_does_not() -> None:
    """Even where no handler can run, in a call that does not come back."""
    child = start(WORKING.format(work="signal.sigwait([signal.SIGUSR1])"))
    assert child.stdout
    assert child.stdout.readline() == "at work\n"
    for _ in range(2):  # from the terminal, and once more from the launcher
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.3)
    assert child.poll() is None
    time.sleep(0.8)
    os.kill(child.pid, signal.SIGINT)
    assert child.wait(5) == 130
    assert child.stdout.read() == "stopped at once\n"


def test_a_process_that_does_not_stop_is_ended() -> None:
    limit = "\n    stopping.STOP_WITHIN_S = 0.2\n"
    child = start(limit + WORKING.format(work="signal.sigwait([signal.SIGUSR1])"))
    assert child.stdout
    child.stdout.readline()
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(5) == 143
    assert "did not stop within" in child.stdout.read()


def test_one_that_stops_in_time_ends_its_step() -> None:
    child = start(WORKING.format(work="time.sleep(0.5)"))
    assert child.stdout
    child.stdout.readline()
    os.kill(child.pid, signal.SIGTERM)
    assert "step done\n" in child.stdout.read()


LAUNCHER = """
    child = subprocess.Popen([sys.executable, "-c", {child!r}])
    print(child.pid, flush=True)
    time.sleep({seconds})
"""

LAUNCHED = """
time.sleep({seconds})
try:
    with stopping.heed_signals(print) as stop, stop.deferred():
        while not stop.signal:
            time.sleep(0.05)
        open({file!r}, "w").write(signal.Signals(stop.signal).name)
except stopping.StoppedError:
    pass
"""


@pytest.mark.parametrize("before", [False, True], ids=["at work", "before it looks"])
def test_no_process_outlives_its_launcher(tmp_path: Path, before: bool) -> None:
    """The launcher is killed, before or after the process begins to watch it."""
    file = tmp_path / "stopped by"
    child = script(LAUNCHED.format(seconds=0.5 * before, file=str(file)))[-1]
    launcher = start(
        LAUNCHER.format(child=child, seconds=60),
        env=os.environ | {"ACCELERATE_MIXED_PRECISION": "no"},
        start_new_session=True,
    )
    assert launcher.stdout
    number = int(launcher.stdout.readline())
    time.sleep(0 if before else 1)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{number}/fd").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert file.read_text() == "SIGTERM"
