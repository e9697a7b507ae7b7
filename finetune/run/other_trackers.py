"""Trackers beside TensorBoard: those that Accelerate knows, on the main process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from tqdm.auto import tqdm

from adapters.errors import UserError
from finetune.recipe.schema import Recipe

PICTURES: Mapping[str, Callable[[Image.Image], Any]] = MappingProxyType(
    {"wandb": lambda picture: [picture], "swanlab": lambda picture: [picture], "aim": lambda p: p}
)
"""The form in which ``log_images`` takes a picture, by the trackers that have one for pictures."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise a UserError if the package of a tracker is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"trackers: the package of {name} is not installed: run `pip install {name}`, or"
                " leave it out."
            )


class OtherTrackers:
    """Trackers of one stage of a run; none by default.

    One that fails, for want of a network or a login, is given up with a warning: the run goes on.

    Args:
        names: the trackers, as Accelerate names them.
        title: the name of the run in them.
        folder: the folder of those that write files.
        config: the run's settings, flat.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        title: str = "",
        folder: Path | None = None,
        config: Mapping[str, float | str] | None = None,
    ) -> None:
        self.trackers: dict[str, GeneralTracker] = {}
        for name in names:
            with self._surviving(name):
                kind = LOGGER_TYPE_TO_CLASS[name]
                places = [str(folder)] if kind.requires_logging_directory else []
                tracker = kind(title, *places)
                tracker.start()
                tracker.store_init_configuration(dict(config or {}))
                self.trackers[name] = tracker

    @classmethod
    def of(
        cls, recipe: Recipe, stage: str, folder: Path, config: Mapping[str, float | str]
    ) -> Self:
        """Start the trackers that a recipe names beside TensorBoard, for one stage."""
        names = [name for name in recipe.trackers if name != "tensorboard"]
        return cls(names, f"{recipe.name}-{stage}", folder, config)

    def log(self, points: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        for name, tracker in list(self.trackers.items()):
            with self._surviving(name):
                tracker.log(dict(points), step=step)

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        """Add a picture, where pictures are shown."""
        for name, tracker in list(self.trackers.items()):
            if name in PICTURES:
                with self._surviving(name):
                    tracker.log_images({tag: PICTURES[name](picture)}, step=step)

    def close(self) -> None:
        """Finish what is pending."""
        for name, tracker in list(self.trackers.items()):
            with self._surviving(name):
                tracker.finish()
        self.trackers.clear()

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Give a tracker up, with a warning, if it fails in the block."""
        try:
            yield
        except Exception as error:  # each has its own errors
            self.trackers.pop(name, None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            tqdm.write(
                f"warning: the tracker {name} failed ({reason}); the run goes on without it."
            )
