"""A display that goes away ends nothing."""

import os
import subprocess
import sys

import pytest

from finetune.run.output import lasting_output
from tests.builders import ROOT

PRINTING = """
import sys
from finetune.run.output import lasting_output
with lasting_output():
    for stream in (sys.stdout, sys.stderr):
        for _ in range(3):
            print("x" * 100_000, file=stream, flush=True)
        assert not stream.isatty()
sys.exit(7)
"""


@pytest.mark.parametrize("gone", ["full disk", "closed pipe"])
def test_what_cannot_be_printed_is_lost(gone: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full:  # noqa: PTH123
        place = full.fileno() if gone == "full disk" else writing
        done = subprocess.run(
            [sys.executable, "-c", PRINTING], cwd=ROOT, stdout=place, stderr=place, check=False
        )
    os.close(writing)
    assert done.returncode == 7


def test_what_can_be_printed_is(capsys: pytest.CaptureFixture[str]) -> None:
    with lasting_output():
        print("one")  # noqa: T201
    assert capsys.readouterr().out == "one\n"
