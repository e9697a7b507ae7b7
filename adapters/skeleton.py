"""As much of a UNet as PEFT needs to load LoRAs, without the base's weights."""

from collections.abc import Mapping

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor, nn

from adapters.keys import modules_of


class AdaptedOnly(nn.Module, PeftAdapterMixin):  # type: ignore[misc]  # diffusers is untyped
    """A UNet of nothing but the modules that LoRAs adapt, whose weights take no memory."""

    def __init__(self, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """From the tensors of LoRAs under PEFT's names; modules are in their order."""
        super().__init__()
        zero = torch.zeros((), device=device)
        for name in modules_of(state):
            *parents, last = name.split(".")
            place: nn.Module = self
            for part in parents:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            a, b = (state[f"{name}.lora_{side}.weight"] for side in "AB")
            inputs, outputs, kernel = a.shape[1], b.shape[0], a.shape[2:]
            with torch.device("meta"):
                layer: nn.Linear | nn.Conv2d = nn.Linear(inputs, outputs)
                if kernel:
                    layer = nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]))
            zeros = zero.expand(layer.weight.shape)  # one number in memory
            layer.weight, layer.bias = nn.Parameter(zeros, requires_grad=False), None
            place.add_module(last, layer)
