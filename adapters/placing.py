"""Where the parts of a cascade are: on its device for good, or only while they work."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from adapters.sampling import Sampling

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placing:
    """Which parts rest in main memory, and how many pictures the device has room for.

    A part that rests is copied to the device to work, and the copy is dropped afterwards, as work
    does not change it. Adapters are merged into what rests.
    """

    device: torch.device
    resting: Collection[str] = ()
    """The parts' names, see :mod:`adapters.budget`."""
    at_once: int | None = None
    """How many pictures are drawn at once at most; ``None``: as many as are asked for."""

    def limited(self, sampling: Sampling) -> Sampling:
        """Sampling of no more pictures at once than there is room for."""
        size = min(sampling.batch_size, self.at_once or sampling.batch_size)
        return sampling.model_copy(update={"batch_size": size})

    def settle(self, part: str, pipe: DiffusionPipeline) -> None:
        """Put a part, newly loaded, where it belongs."""
        pipe.to(CPU if part in self.resting else self.device)

    @property
    def scarce(self) -> bool:
        """Whether parts must leave each other room."""
        return self.at_once is not None or bool(self.resting)

    @contextmanager
    def at_work(self, part: str, pipe: DiffusionPipeline) -> Iterator[None]:
        """A part on its device, which is the current one."""
        on_gpu = self.device.type == "cuda"
        current = torch.cuda.device(self.device) if on_gpu else nullcontext()
        with current, self._moved(pipe) if part in self.resting else nullcontext():
            yield

    @contextmanager
    def _moved(self, pipe: DiffusionPipeline) -> Iterator[None]:
        resting: dict[int, Tensor] = {}

        def there(weight: Tensor) -> Tensor:
            if weight.device == self.device:  # models and their layers may share it
                return weight
            copied = weight.detach().to(self.device)
            resting[copied.data_ptr()] = weight.detach()
            return copied

        def back(weight: Tensor) -> Tensor:
            return resting.get(weight.data_ptr(), weight)

        models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
        try:
            for model in models:
                model._apply(there)
            yield
        finally:
            for model in models:
                model._apply(back)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
