"""LoRA files for plain diffusers: written, and tried with diffusers' own loader without a base."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import IFPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import logging
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.files.keys import module_of, modules_of
from adapters.files.reading import scaling
from adapters.weights.kinds import ADAPTER_NAME


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


def save_for_diffusers(
    tensors: dict[str, Tensor], config: PeftConfig, path: Path, header: dict[str, str]
) -> None:
    """Write what ``load_lora_weights`` reads; only settings that differ from PEFT's own defaults.

    Fewer settings keep the file loadable by PEFT versions that lack the newest ones.
    """
    prefix = IFPipeline.unet_name
    defaults = type(config)().to_dict()
    settings: dict[str, Any] = {
        f"{prefix}.{key}": value
        for key, value in plain_settings(config).items()
        if value != defaults[key] or key in ("r", "lora_alpha")
    }
    save_file(
        {f"{prefix}.{name}": tensor for name, tensor in tensors.items()},
        path,
        metadata=header | {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, sort_keys=True)},
    )


def plain_settings(config: PeftConfig) -> dict[str, Any]:
    """A PEFT configuration in JSON's types; sets become sorted lists."""
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
        if key not in ("base_model_name_or_path", "revision", "inference_mode")
    }


def arriving(file: Path, config: LoraConfig, state: Mapping[str, Tensor]) -> list[str]:
    """The tensors of a LoRA file that diffusers' own ``load_lora_weights`` puts to use.

    It loads the file into a pipeline whose UNet is only what the LoRA adapts.

    Args:
        file: the file.
        config: what the file means, and
        state: its tensors under PEFT's names.

    Returns:
        The names of those that arrive unchanged, in modules that scale them by alpha as meant.
    """
    pipe = IFPipeline(*[None] * 7, requires_safety_checker=False)
    pipe.unet = AdaptedOnly(state)
    try:
        with silence():
            pipe.load_lora_weights(file, adapter_name=ADAPTER_NAME)
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError):
        return []  # it refuses the file
    if "peft_config" not in vars(pipe.unet):
        return []  # it found nothing to load
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name=ADAPTER_NAME)
    layers = {name: pipe.unet.get_submodule(name) for name in modules_of(loaded)}
    scaled = {
        name
        for name, layer in layers.items()
        if layer.scaling[ADAPTER_NAME] == scaling(config, state, name)
    }
    return [
        name
        for name, tensor in state.items()
        if name in loaded and torch.equal(loaded[name], tensor) and module_of(name) in scaled
    ]


@contextmanager
def silence() -> Iterator[None]:
    """Without what diffusers and PEFT say of keys that they do not know."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(before)
