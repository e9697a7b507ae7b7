"""Children end with the process that runs them, and share the cores."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from finetune.sweeping.processes import Children, read_progress, read_reason, share_cores

SLEEPER = """
import os, sys, time
print("cores", sorted(os.sched_getaffinity(0)), flush=True)
sys.stdin.read()
print("closed", flush=True)
"""

PARENT = """
from pathlib import Path
from finetune.sweeping.processes import Children
Children().run("sleeper", [], Path("log"))
"""

PATIENCE_S = 60


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of a child that runs until its input is closed."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path / "log"


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline, f"{log} never said {text!r}"
        time.sleep(0.02)


def test_ending_closes_the_children_and_starts_no_more(log: Path) -> None:
    children, statuses = Children(), list[int]()
    core = min(os.sched_getaffinity(0))
    runner = threading.Thread(
        target=lambda: statuses.append(children.run("sleeper", [], log, [core]))
    )
    runner.start()
    wait_for(log, "cores")
    children.end()
    runner.join(PATIENCE_S)
    assert statuses == [0]
    assert "closed" in log.read_text()
    assert children.run("sleeper", [], log) != 0


def test_a_killed_process_takes_its_children_along(log: Path) -> None:
    root = Path(__file__).parents[3]
    paths = os.pathsep.join([str(log.parent), str(root)])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=log.parent, env=os.environ | {"PYTHONPATH": paths}
    )
    wait_for(log, "cores")
    parent.send_signal(signal.SIGKILL)
    parent.wait(PATIENCE_S)
    wait_for(log, "closed")


def test_cores_are_shared_without_overlap() -> None:
    cores = os.sched_getaffinity(0)
    assert share_cores(0, 1) is None
    shares = [set(share_cores(slot, len(cores)) or ()) for slot in range(len(cores))]
    assert set().union(*shares) == cores
    assert sum(map(len, shares)) == len(cores)
    assert all(share_cores(slot, 3 * len(cores)) for slot in range(3 * len(cores)))


def test_a_log_says_how_far_a_child_is_and_why_it_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert read_progress(log) == ""
    log.write_text("Stage 1:   0%|   | 0/9\rStage 1:  44%|##  | 4/9 [00:01<00:02]\n")
    assert read_progress(log) == "Stage 1 44%"
    log.write_text("error: The loss is nan at step 2: lower it. Then retry.\n[W] a warning\n")
    assert read_reason(log) == "The loss is nan at step 2: lower it."
    log.write_text("Traceback (most recent call last):\n  File x\nValueError: no\n")
    assert read_reason(log) == "ValueError: no"
