"""Writing LoRA files for plain diffusers, and trying them with its own loader, without a base."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import IFPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import logging
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from torch import Tensor, nn

from adapters.base.tensor_files import save_tensors
from adapters.files.keys import by_module, split_name
from adapters.files.reading import scaling
from adapters.weights.kinds import ADAPTER_NAME, adapted_modules


class AdaptedOnly(nn.Module, PeftAdapterMixin):  # type: ignore[misc]  # diffusers is untyped
    """A UNet with only the modules that an adapter adapts, without biases."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Create the modules from weights [out, in] or [out, in, height, width], by name."""
        super().__init__()
        for name, weight in weights.items():
            *parents, last = name.split(".")
            place: nn.Module = self
            for part in parents:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            outputs, inputs, *kernel = weight.shape
            with torch.device("meta"):
                layer: nn.Linear | nn.Conv2d = nn.Linear(inputs, outputs, bias=False)
                if kernel:
                    layer = nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), bias=False)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            place.add_module(last, layer)


def blank_weights(
    state: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Create the weights that LoRAs adapt, by module, as zeros that take no memory."""
    zero = torch.zeros((), device=device)
    return {
        name: zero.expand(len(own["lora_B.weight"]), *own["lora_A.weight"].shape[1:])
        for name, own in by_module(state).items()
    }


def save_for_diffusers(
    tensors: dict[str, Tensor], config: PeftConfig, path: Path, header: dict[str, str]
) -> None:
    """Write a file for ``load_lora_weights``, with only the settings that are not PEFT's defaults.

    Fewer settings keep the file loadable by PEFT versions that lack the newest ones.
    """
    prefix, defaults = IFPipeline.unet_name, type(config)().to_dict()
    settings = {
        f"{prefix}.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
        if key not in ("base_model_name_or_path", "revision", "inference_mode")
        and (value != defaults[key] or key in ("r", "lora_alpha"))
    }
    save_tensors(
        path,
        {f"{prefix}.{name}": tensor for name, tensor in tensors.items()},
        header | {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, sort_keys=True)},
    )


def list_arriving(file: Path, config: LoraConfig, state: Mapping[str, Tensor]) -> list[str]:
    """List the tensors of a LoRA file that diffusers' own ``load_lora_weights`` uses.

    The file is loaded into a pipeline with a UNet of only the modules that the LoRA adapts. Those
    tensors of ``state`` count that arrive unchanged, in modules that scale them as ``config`` says.
    """
    pipe = IFPipeline(*[None] * 7, requires_safety_checker=False)
    pipe.unet = AdaptedOnly(blank_weights(state))
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # no warnings of unknown keys: the result shows them
    try:
        with warnings.catch_warnings(action="ignore"):
            pipe.load_lora_weights(file, adapter_name=ADAPTER_NAME)
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError):
        return []  # diffusers refuses the file
    finally:
        logging.set_verbosity(verbosity)
    adapted = adapted_modules(pipe.unet)
    if not adapted:
        return []  # diffusers found nothing to load
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name=ADAPTER_NAME)
    scaled = {
        name
        for name in adapted
        if pipe.unet.get_submodule(name).scaling[ADAPTER_NAME] == scaling(config, name)
    }
    return [
        name
        for name, tensor in state.items()
        if name in loaded and torch.equal(loaded[name], tensor) and split_name(name)[0] in scaled
    ]
