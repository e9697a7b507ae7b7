"""Processes in which the libraries are imported already, as a new interpreter takes seconds to.

They are forked by a server, which has imported them once. What a launch itself does, such as
Accelerate's launcher, is tested with real launches.
"""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["finetune.train", "tests.builders.preloaded"])


class Child:
    """A process at work, on one thread.

    Args:
        log: the file that what it prints is appended to, and with the suffix `.err` its errors.
        work: what it does, a function of a module.
        arguments: given to ``work``.
        environment: variables of its environment, besides this process's.
    """

    def __init__(
        self,
        log: Path,
        work: Callable[..., object],
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        given = (log, dict(environment or {}), work, arguments)
        self.process = _SERVER.Process(target=_work, args=given)
        self.process.start()

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for its end, and return its status; ``None``: it has not ended within the seconds.

        The status of a process that a signal ended is the signal's number, below 0.
        """
        self.process.join(seconds)
        return self.process.exitcode

    @property
    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text()

    @property
    def errors(self) -> str:
        """What it has printed on standard error."""
        return self.log.with_suffix(".err").read_text()

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid
        os.kill(self.process.pid, number)


def train(arguments: Sequence[str]) -> None:
    """Train as the command does, but for its estimate of memory, which takes seconds."""
    from finetune import train as command

    command.print_plan = lambda *_: None
    command.main(arguments)


def train_on_several(log: Path, *arguments: str, processes: int = 2) -> list[int | None]:
    """Train as a launcher of several processes has them train, without the launcher.

    Args:
        log: the file that the output of all is appended to, and with the suffix `.err` errors.
        arguments: of ``python -m finetune.train``.
        processes: their number.

    Returns:
        The status of each.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    children = [
        Child(
            log, train, arguments, environment=shared | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        )
        for rank in range(processes)
    ]
    return [child.wait() for child in children]


def _work(
    log: Path,
    environment: Mapping[str, str],
    work: Callable[..., object],
    arguments: tuple[object, ...],
) -> None:
    for place, stream in ((log, 1), (log.with_suffix(".err"), 2)):
        with place.open("a") as file:
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    torch.set_num_threads = lambda number: None  # type: ignore[assignment]
    work(*arguments)
