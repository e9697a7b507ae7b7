"""IF's safety checker, which visits the device of the pictures that it checks."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker
from torch import Tensor, nn
from transformers import CLIPConfig

# diffusers prints every safety checker that is handed to it, layer by layer
logging.getLogger("diffusers.pipelines.pipeline_loading_utils").addFilter(
    lambda record: "non-standard module" not in record.getMessage()
)


class SafetyChecker(IFSafetyChecker):  # type: ignore[misc]  # diffusers is untyped
    """IF's safety checker in main memory, made to load and run with current libraries.

    In diffusers 0.42 it omits the ``post_init`` without which transformers 5 cannot load it, and
    blackens only arrays, while the x4 upscaler passes a tensor.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self, clip_input: Tensor, images: np.ndarray | Tensor, **thresholds: float
    ) -> tuple[np.ndarray | Tensor, list[bool], list[bool]]:
        """Blacken flagged pictures of ``images``, [N, ...] in any layout, in place."""
        with visit([self], clip_input.device):
            if not isinstance(images, Tensor):
                return super().forward(clip_input, images, **thresholds)
            flags = super().forward(clip_input, np.zeros(len(images)), **thresholds)[1:]
        images[torch.tensor(flags).any(dim=0)] = 0
        return images, *flags


@contextmanager
def visit(models: Collection[nn.Module], device: torch.device) -> Iterator[None]:
    """Copy models' weights to a device, and drop the copies afterwards, as nothing changes them."""
    resting: dict[int, Tensor] = {}

    def there(weight: Tensor) -> Tensor:
        if weight.device == device:  # models and their layers may share a weight
            return weight
        copied = weight.detach().to(device)
        resting[copied.data_ptr()] = weight.detach()
        return copied

    def back(weight: Tensor) -> Tensor:
        return resting.get(weight.data_ptr(), weight)

    try:
        for model in models:
            model._apply(there)
        yield
    finally:
        for model in models:
            model._apply(back)
        if resting and device.type == "cuda":
            torch.cuda.empty_cache()
