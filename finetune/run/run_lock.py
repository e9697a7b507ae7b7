"""The lock on a run's folder, and the mark of a run that was killed."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from adapters.atomic import writing_to
from adapters.errors import UserError

LOCK = ".running"
"""The file in a run's folder that its process locks. It says who that is, and is empty after the
process has ended in order: one that is killed leaves it as it is, but not the lock."""

HELD = (errno.EAGAIN, errno.EACCES)
"""The system's errors if another process has the lock."""

MARK_BYTES = 1000
"""The most that is read of the file."""


@contextmanager
def hold_run(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs out of a run's folder while the block runs, on all of its processes.

    Raises:
        UserError: if a run is at work there, or the folder cannot be written.
    """
    refusal: list[str | None] = [None]
    with ExitStack() as held:
        if accelerator.is_main_process:
            try:
                held.enter_context(_lock(folder))
            except UserError as error:
                refusal = [str(error)]
        broadcast_object_list(refusal)
        if refusal[0] and not accelerator.is_main_process:
            raise SystemExit(2)  # the main process says why
        if refusal[0]:
            raise UserError(refusal[0])
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock a run's folder; the system opens it when this process ends, however it does."""
    file, handle = folder / LOCK, None
    while handle is None or not _is_in_place(file, handle):  # a run that left nothing has gone
        if handle is not None:
            os.close(handle)
        with writing_to(file):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        _take(handle, folder)
    try:
        if holder := _read(handle):
            tqdm.write(
                f"The last run in {folder} ({holder}) was killed, perhaps by the system for want of"
                " main memory: this one goes on from its newest checkpoint, if there is one."
            )
        with writing_to(file):
            _write(handle, _describe_process())
        try:
            yield
        finally:  # after an error or a signal, too
            os.ftruncate(handle, 0)
            if [each.name for each in folder.iterdir()] == [LOCK]:
                file.unlink()
                _remove_empty(folder)
    finally:
        os.close(handle)


def _is_in_place(file: Path, handle: int) -> bool:
    """Tell whether a file has not been removed since it was opened."""
    return file.exists() and os.path.samestat(file.stat(), os.fstat(handle))


def _remove_empty(folder: Path) -> None:
    """Remove a run's folder, and the folder of all runs, as far as they are empty."""
    with suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def _take(handle: int, folder: Path) -> None:
    """Lock an open file, or close it and refuse."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in HELD:
            tqdm.write(
                f"warning: the file system of {folder} keeps no locks ({error.strerror}): take care"
                " that no second run is started there."
            )
            return
        holder = _read(handle) or "which does not say who it is"
        os.close(handle)
        raise UserError(
            f"Another run is at work in {folder} ({holder}): wait for it, end it, or give this"
            " recipe another name."
        ) from None


def _describe_process() -> str:
    """Describe this process."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since}"


def _read(handle: int) -> str:
    """Read from the file which process has, or had, the lock; empty: none."""
    try:
        return str(json.loads(os.pread(handle, MARK_BYTES, 0))["holder"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _write(handle: int, holder: str) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"holder": holder}).encode(), 0)
