"""The ends of runs that nobody asked to end, in sentences."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError

from adapters.errors import UserError, first_line
from finetune.run.checkpoints import is_whole, list_checkpoints
from finetune.run.folders import Folders
from finetune.step.stages import STAGES


def lacks_main_memory(error: Exception) -> bool:
    """Recognise that the system refuses main memory, which PyTorch says in its own words."""
    refused = ("DefaultCPUAllocator", "Cannot allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in refused)
    )


def lost_a_process(error: Exception) -> bool:
    """Recognise that another process of the run does not answer."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def lacks_disk(error: Exception) -> bool:
    """Recognise that the disk refuses to write or to read."""
    return isinstance(error, OSError | SafetensorError)


FAILURES: Mapping[Callable[[Exception], bool], str] = {
    lacks_main_memory: "The system refuses more main memory ({reason}): end other programs, or use"
    " a smaller batch_size.",
    lost_a_process: "Another process of this run has ended ({reason}).",
    lacks_disk: "The system reported an error ({reason}): fix that, and start again.",
}
"""Sentences by what recognises their errors."""


def explain(error: Exception) -> str | None:
    """Explain an error in a sentence; ``None``: it is not one that a run can expect."""
    if isinstance(error, UserError):
        return str(error)
    for recognise, sentence in FAILURES.items():
        if recognise(error):
            return sentence.format(reason=first_line(error))
    return None


def find_newest(folders: Folders) -> Path | None:
    """Find the newest whole checkpoint of a run; ``None``: it has none."""
    saved = [
        each for stage in STAGES.values() for each in list_checkpoints(folders.checkpoints(stage))
    ]
    return next(filter(is_whole, reversed(saved)), None)


def name_newest(folders: Folders) -> str:
    """Name a run's newest checkpoint in a sentence; empty: it has none."""
    newest = find_newest(folders)
    return f"The newest checkpoint is {newest}." if newest else ""


def say_how_to_go_on(folders: Folders) -> str:
    """Say how a stopped run goes on."""
    if newest := find_newest(folders):
        return f"the same command goes on from {newest}."
    return "the same command starts again; what has been encoded and drawn for it is kept."
