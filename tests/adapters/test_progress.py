"""Bars are for those who watch; logs get lines."""

import io
import sys
from collections.abc import Iterator

import pytest

from adapters import progress
from adapters.progress import Bar, Pace, format_seconds, show_in_files, timed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    progress._shown["in files"] = False


def test_a_bar_is_shown_in_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(Bar(range(3), "Counting")) == [0, 1, 2]
        assert ("Counting: 100%" in stream.getvalue()) == shown
        if not shown:
            assert stream.getvalue() == ""


def test_a_program_that_reads_logs_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    show_in_files()
    list(Bar(range(3), "Counting"))
    assert "Counting: 100%" in log.getvalue()


def test_a_phase_says_how_long_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    with timed("Reading"):
        pass
    with timed("Writing", shown=False):
        pass
    with pytest.raises(ValueError, match="no"), timed("Failing"):
        raise ValueError("no")
    assert capsys.readouterr().out == "Reading: 0.0 s\n"


def test_a_pace_leaves_other_work_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("adapters.progress.time.perf_counter", lambda: clock[0])
    pace = Pace(first=10, steps=30)
    clock[0] += 5
    clock[0] += 60
    pace.skip(60)
    assert pace.seconds == 5
    assert pace.describe(20) == "66%, step 20 of 30, 2 steps/s, 5.0 s left"
    assert pace.describe(10).endswith("? left")


def test_durations() -> None:
    assert [format_seconds(s) for s in (0, 9.94, 60, 61, 3599, 86400)] == [
        *("0.0 s", "9.9 s", "60 s", "1 min 1 s", "59 min 59 s", "24 h 0 min")
    ]
