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
    """The parts that rest in main memory, and the number of pictures that fit the device.

    A resting part is copied to the device to work. Adapters are merged into the resting weights.
    """

    device: torch.device
    resting: Collection[str] = ()
    """The parts' names, see :mod:`adapters.cascade.memory_budget`."""
    at_once: int | None = None
    """The most pictures drawn at once; ``None``: no limit."""

    def limit(self, sampling: Sampling) -> Sampling:
        """Limit the batch size to the number of pictures that fit."""
        size = min(sampling.batch_size, self.at_once or sampling.batch_size)
        return sampling.model_copy(update={"batch_size": size})

    def settle(self, part: str, pipe: DiffusionPipeline) -> None:
        """Put a newly loaded part where it belongs."""
        for model in _models(pipe):
            model.to("cpu" if part in self.resting else self.device)

    @property
    def is_scarce(self) -> bool:
        """True if the parts must make room for one another."""
        return self.at_once is not None or bool(self.resting)

    @contextmanager
    def at_work(self, part: str, pipe: DiffusionPipeline) -> Iterator[None]:
        """Keep a part on the device for a block, with that as the current device."""
        on_gpu = self.device.type == "cuda"
        current = torch.cuda.device(self.device) if on_gpu else nullcontext()
        with current, visit(_models(pipe) if part in self.resting else (), self.device):
            yield


def _models(pipe: DiffusionPipeline) -> list[nn.Module]:
    """List a pipeline's networks to place: all but the safety checker, which moves by itself."""
    components = pipe.components.items()
    return [each for name, each in components if isinstance(each, nn.Module) and name != CHECKER]
