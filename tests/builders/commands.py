"""Commands as a shell runs them."""

import signal
from collections.abc import Callable

import pytest


def heed_interrupts() -> None:
    """Undo in a new process what a shell's & does, after which Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def refusal(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], *arguments: object
) -> str:
    """The one sentence with which a command exits with status 2, having printed nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err
