"""One run of a sweep in a process of its own: trained, then scored at each adapter scale.

``python -m finetune.sweeping.child RECIPE --scales 0.7,1`` does what is not done yet. The process
ends when its standard input is closed, that is when the sweep ends, however it does.
"""

import _thread
import argparse
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence

from finetune.command import run_command
from finetune.recipe.schema import Recipe

TRAINER = "finetune.train"
"""The trainer's module. As a command it stands above this one, so it is run and not imported."""

GRACE_S = 20
"""The seconds that an interrupted process has to end by itself."""

INTERRUPTED = 130
"""The exit status of an interrupted command, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & makes it ignored
    threading.Thread(target=_end_when_closed, daemon=True).start()
    scales = {"default": "1", "help": "the adapter scales, with commas between them"}
    about = "Train a run of a sweep, and score it at several adapter scales."
    run_command("sweeping.child", about, arguments, train_and_score, scales=scales)


def train_and_score(recipe: Recipe, options: argparse.Namespace) -> str:
    """Train a run unless it is trained, and score the scales that are not scored."""
    from filelock import FileLock

    from adapters.errors import quiet_libraries
    from adapters.progress import show_in_files
    from finetune.sweeping.progress import add_seconds, is_trained
    from finetune.sweeping.scoring import score_and_keep

    quiet_libraries()
    show_in_files()  # the sweep reads in the log how far this is
    # a sweep that goes on at once may find a child of the killed one, which is still ending
    with FileLock(recipe.folder / ".lock"):
        if not is_trained(recipe):
            started = time.monotonic()
            sys.argv = [TRAINER, str(options.recipe)]
            try:
                runpy.run_module(TRAINER, run_name="__main__", alter_sys=True)
            finally:
                add_seconds(recipe, time.monotonic() - started)
        score_and_keep(recipe, [float(text) for text in options.scales.split(",")])
    return f"Trained and scored: {recipe.folder}\n"


def _end_when_closed() -> None:
    """Interrupt the main thread, as Ctrl-C would, when standard input ends."""
    while os.read(0, 1):
        pass
    _thread.interrupt_main()
    time.sleep(GRACE_S)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
