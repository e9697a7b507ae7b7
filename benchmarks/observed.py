"""Run a training program unchanged, and record when its steps ended and how much memory it took.

    python -m benchmarks.observed OUT.json script.py [argument …]
    python -m benchmarks.observed OUT.json -m module [argument …]

The program runs in this process, as ``python`` would run it. A step is a call of a torch
optimizer's ``step``, bitsandbytes' included. A step that a CUDA graph replays is not seen, so
compare ``steps`` in OUT.json with the number that the program should take.

A GPU works asynchronously, so a step that has ended on the host may still be running. The program
waits for the device after the first step and every tenth (``synchronized``) only, since waiting
after each would slow it down.

OUT.json holds:
    launched: true if LAUNCHED_AT gave the start; otherwise times count from this file's own start.
    steps: the number of steps.
    host_s: the time at which each ended on the host; like all times, in seconds since the launch.
    synchronized: for the first step and every tenth its ``step``, ``at_s``, and the peaks so far.
    ended_s: the time at which the program ended.
    peaks: GiB over the whole process, even if the program resets torch's own count: torch's
        ``reserved_gib`` and ``allocated_gib`` (``null`` without a GPU), and ``resident_gib``, the
        peak of main memory.
"""

import argparse
import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

LAUNCHED_AT = "OBSERVED_LAUNCHED_AT"
"""The environment variable in which the launcher gives its ``time.monotonic()``.

On Linux all processes share this clock, so the launcher's own start-up counts.
"""

SYNCHRONIZE_EVERY = 10
GIB = 2**30  # importing unets.tally would change PyTorch's allocator for the observed program


class Observer:
    """The record of a program; ``step`` is called after each of its steps."""

    def __init__(self) -> None:
        given = os.environ.get(LAUNCHED_AT)
        self.launched = given is not None
        self.start = float(given) if given else time.monotonic()
        self.host_s: list[float] = []
        self.synchronized: list[dict[str, Any]] = []
        self.reserved = self.allocated = 0

    def now_s(self) -> float:
        """Count the seconds since the launch."""
        return time.monotonic() - self.start

    def step(self, *_: object) -> None:
        """Note the end of an optimizer step."""
        self.host_s.append(self.now_s())
        step = len(self.host_s)
        if step == 1 or step % SYNCHRONIZE_EVERY == 0:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.synchronized.append({"step": step, "at_s": self.now_s(), "peaks": self.peaks()})

    def look_at_memory(self) -> None:
        """Note torch's peaks, before the program resets them."""
        if torch.cuda.is_initialized():
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            self.allocated = max(self.allocated, torch.cuda.max_memory_allocated())

    def peaks(self) -> dict[str, float | None]:
        """Report the most memory so far, in GiB."""
        self.look_at_memory()
        on_gpu = torch.cuda.is_initialized()
        return {
            "reserved_gib": self.reserved / GIB if on_gpu else None,
            "allocated_gib": self.allocated / GIB if on_gpu else None,
            "resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        }

    def report(self) -> dict[str, Any]:
        """Build the whole record, as in OUT.json."""
        return {
            "launched": self.launched,
            "steps": len(self.host_s),
            "host_s": self.host_s,
            "synchronized": self.synchronized,
            "ended_s": self.now_s(),
            "peaks": self.peaks(),
        }


def observe(observer: Observer) -> None:
    """Observe every optimizer's steps, and every reset of torch's memory peaks."""
    register_optimizer_step_post_hook(observer.step)
    reset = torch.cuda.reset_peak_memory_stats

    def reset_after_a_look(*arguments: Any, **options: Any) -> None:
        observer.look_at_memory()
        reset(*arguments, **options)

    torch.cuda.reset_peak_memory_stats = reset_after_a_look
    torch.cuda.memory.reset_peak_memory_stats = reset_after_a_look


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("program", nargs=argparse.REMAINDER, help="[-m module | script] argument …")
    options = parser.parse_args()
    as_module = options.program[:1] == ["-m"]
    name, *arguments = options.program[as_module:]
    observer = Observer()
    observe(observer)
    sys.argv = [name, *arguments]
    try:
        if as_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(name).parent))
            runpy.run_path(name, run_name="__main__")
    finally:
        options.out.write_text(json.dumps(observer.report(), indent=1))


if __name__ == "__main__":
    main()
