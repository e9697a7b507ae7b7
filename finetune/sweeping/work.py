"""The work of a sweep: each run trained and then scored, one after another or several at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from adapters.atomic import write_text
from adapters.errors import UserError
from adapters.progress import Bar
from finetune.sweeping.checks import check_at_once, check_material, find_trained
from finetune.sweeping.names import name_variant
from finetune.sweeping.points import Point
from finetune.sweeping.processes import Children, read_progress, read_reason, share_cores
from finetune.sweeping.progress import is_scored
from finetune.sweeping.scoring import read_scores

CHILD = "finetune.sweeping.child"
"""The module that trains and scores a run."""

LOOK_EVERY_S = 1.0
"""The seconds between two looks at what the running children say of their progress."""


class StoppedError(Exception):
    """A child that ended because the sweep was."""


@dataclass(frozen=True)
class Result:
    """A run that is done, or has failed."""

    point: Point
    scores: Mapping[str, Any] = field(default_factory=dict)
    """The content of its scores file; empty if it failed."""
    failure: str | None = None
    """The reason in a sentence; ``None``: it is trained and scored."""

    @classmethod
    def read(cls, point: Point) -> "Result":
        """Read the result of a run that is done, once: its adapters are hashed for that."""
        return cls(point, read_scores(point.recipe))


@dataclass
class Workers:
    """The children that train and score, in as many slots as runs are made at once."""

    scales: Sequence[float]
    slots: int
    children: Children = field(default_factory=Children)
    running: dict[str, Path] = field(default_factory=dict)
    """The logs of the running children, by run."""

    def __post_init__(self) -> None:
        self._free: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.slots):
            self._free.put(slot)

    def finish(self, point: Point) -> Result:
        """Train and score a run in a child.

        Raises:
            StoppedError: if the sweep ends.
        """
        slot, log = self._free.get(), point.folder / "sweep.log"
        self.running[point.name] = log
        try:
            scales = ",".join(map(name_variant, self.scales))
            arguments = [str(point.recipe_file), "--scales", scales]
            status = self.children.run(CHILD, arguments, log, share_cores(slot, self.slots))
        finally:
            del self.running[point.name]
            self._free.put(slot)
        if self.children.ended:
            raise StoppedError
        if status:
            return Result(point, failure=f"{read_reason(log)} ({log})")
        return Result.read(point)

    def describe(self) -> str:
        """Describe what is running, for the progress bar."""
        return ", ".join(
            f"{name} {read_progress(log)}".strip() for name, log in dict(self.running).items()
        )


def finish_points(
    points: Sequence[Point],
    *,
    scales: Sequence[float],
    at_once: int,
    title: str,
    show: Callable[[Sequence[Result]], object],
) -> list[Result]:
    """Train and score what is not, and return all results in the order of the points.

    Args:
        points: the runs.
        scales: the adapter scales to score.
        at_once: the number of runs at a time.
        title: the title of the progress bar.
        show: called with the results so far, before the first run and after each.

    Raises:
        UserError: if a folder holds another recipe's run, a recipe has a mistake that is found
            without training, or the GPU has no room for the runs at once. No run is started then.
    """
    trained = find_trained(points)
    done_before = [p for p in points if p.name in trained and is_scored(p.recipe, scales)]
    to_do = [point for point in points if point not in done_before]
    check_material(to_do, trained, len(points))
    check_at_once(to_do, at_once)
    for point in to_do:
        write_text(point.recipe_file, point.recipe.to_yaml())
    workers, results = Workers(scales, at_once), [Result.read(point) for point in done_before]
    show(results)
    described = ""
    bar = Bar(desc=title, initial=len(results), total=len(points), unit="run", dynamic_ncols=True)
    with bar, ThreadPoolExecutor(at_once) as pool:
        pending = {pool.submit(workers.finish, point) for point in to_do}
        try:
            while pending:
                done, pending = wait(pending, LOOK_EVERY_S, FIRST_COMPLETED)
                for future in done:
                    results.append(result := future.result())
                    bar.update()
                    if result.failure:
                        tqdm.write(f"{result.point.name} failed: {result.failure}")
                    show(results)
                if (running := workers.describe()) != described:
                    described = running
                    bar.set_postfix_str(running)
        finally:  # children end with an interrupted sweep
            for future in pending:
                future.cancel()
            workers.children.end()
    order = [point.name for point in points]
    return sorted(results, key=lambda result: order.index(result.point.name))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder.

    Raises:
        UserError: if one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):  # the system opens it when this process ends
            yield
    except Timeout:
        raise UserError(
            f"Another sweep is at work in {folder}: wait for it, or give this one a name."
        ) from None
