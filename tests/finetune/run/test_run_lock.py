"""One run at a time is at work in a folder; one that was killed is spoken of at the next start."""

import fcntl
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from accelerate import Accelerator

from adapters.errors import UserError
from finetune.run import run_lock
from finetune.run.run_lock import LOCK, hold_run
from tests.builders import ROOT

HOLDER = """
import os, sys
from pathlib import Path
from finetune.run.run_lock import _lock
with _lock(Path(sys.argv[1])):
    print("at work", flush=True)
    sys.stdin.readline()
"""


def hold_in_another_process(folder: Path) -> subprocess.Popen[str]:
    """Hold a folder until a line is written to the process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "at work\n"
    return process


def test_a_second_run_is_told_which_process_has_the_folder_and_a_killed_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "dog"
    other = hold_in_another_process(folder)
    words = rf"at work in {folder} \(process {other.pid} on \S+, since 20.*\): wait for it"
    with pytest.raises(UserError, match=words), hold_run(folder, Accelerator(cpu=True)):
        pass
    other.kill()
    other.wait()
    capsys.readouterr()
    with hold_run(folder, Accelerator(cpu=True)):
        assert f"(process {other.pid} on" in capsys.readouterr().out
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} on"),
            hold_run(folder, Accelerator(cpu=True)),
        ):
            pass
    with hold_run(folder, Accelerator(cpu=True)):
        pass
    assert capsys.readouterr().out == ""


def test_an_error_is_an_end_in_order(tmp_path: Path) -> None:
    run, other = tmp_path / "runs/run", tmp_path / "runs/other"
    for folder in (run, other):
        with suppress(SystemExit), hold_run(folder, Accelerator(cpu=True)):
            assert (folder / LOCK).read_text() != ""
            if folder == run:
                (folder / "recipe.yaml").touch()
            raise SystemExit(1)
    assert (run / LOCK).read_text() == ""
    assert not other.exists()  # as it has left nothing else


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock, "fcntl", fcntl_with(refuse))
    with hold_run(tmp_path, Accelerator(cpu=True)):
        assert "keeps no locks (No locks available)" in capsys.readouterr().out


def fcntl_with(flock: object) -> object:
    """The module with another ``flock``."""
    return type("fcntl", (), {"flock": flock, "LOCK_EX": fcntl.LOCK_EX, "LOCK_NB": fcntl.LOCK_NB})


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"\.running cannot be written"),
        hold_run(tmp_path / "file" / "run", Accelerator(cpu=True)),
    ):
        pass
