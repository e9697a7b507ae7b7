"""The place of each part of a cascade: on its device for good, or only while it works."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

from adapters.base.guards import visit
from adapters.base.source import CHECKER
from adapters.cascade.sampling import Sampling


@dataclass(frozen=True)
class Placement:
    """The parts that rest in main memory, and how many pictures the device has room for.

    A part that rests is copied to the device to work. Adapters are merged into what rests.
    """

    device: torch.device
    resting: Collection[str] = ()
    """The parts' names, see :mod:`adapters.cascade.memory_budget`."""
    at_once: int | None = None
    """The most pictures drawn at once; ``None``: as many as are asked for."""

    def limit(self, sampling: Sampling) -> Sampling:
        """Sampling of no more pictures at once than there is room for."""
        size = min(sampling.batch_size, self.at_once or sampling.batch_size)
        return sampling.model_copy(update={"batch_size": size})

    def settle(self, part: str, pipe: DiffusionPipeline) -> None:
        """Put a newly loaded part where it belongs."""
        for model in _models(pipe):
            model.to("cpu" if part in self.resting else self.device)

    @property
    def is_scarce(self) -> bool:
        """True where parts must leave each other room."""
        return self.at_once is not None or bool(self.resting)

    @contextmanager
    def at_work(self, part: str, pipe: DiffusionPipeline) -> Iterator[None]:
        """Keep a part on its device, which is the current one."""
        on_gpu = self.device.type == "cuda"
        current = torch.cuda.device(self.device) if on_gpu else nullcontext()
        with current, visit(_models(pipe) if part in self.resting else (), self.device):
            yield


def _models(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The networks of a pipeline that are placed: all but the safety checker, which visits."""
    components = pipe.components.items()
    return [each for name, each in components if isinstance(each, nn.Module) and name != CHECKER]
