"""Adapter files as other tools write them."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import IFPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from adapters.weights.kinds import AdapterSpec

ATTENTION = AdapterSpec(rank=4)

SPEC = AdapterSpec(rank=4, alpha=3.0, targets="attention+conv")

NAME = "pytorch_lora_weights.safetensors"


def diffusers_script(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As the last lines of examples/dreambooth/train_dreambooth_lora.py save; alpha is the rank."""
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=state)
    return folder / NAME


def simpletuner(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As SimpleTuner's checkpoints of IF: PEFT's names, with the configuration in the header."""
    IFPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        **_collate_lora_metadata({"unet": unet}),
    )
    return folder / NAME


def respelled(unet: UNet2DConditionModel, folder: Path, spell: Callable[[str, str], str]) -> Path:
    """Each module with ``.alpha``, under keys that ``spell`` makes of module and tensor."""
    config = unet.peft_config["default"]
    tensors = {}
    for name, tensor in get_peft_model_state_dict(unet).items():
        module, side = name.rsplit(".lora_", 1)
        tensors[spell(module, f"lora_{side}")] = tensor
        tensors[spell(module, "alpha")] = torch.tensor(float(config.lora_alpha))
    save_file(tensors, folder / "last.safetensors")
    return folder / "last.safetensors"


def kohya(unet: UNet2DConditionModel, folder: Path) -> Path:
    endings = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    return respelled(
        unet, folder, lambda m, t: f"lora_unet_{m.replace('.', '_')}.{endings.get(t, t)}"
    )


def comfyui(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As SimpleTuner writes with ``lora_format=comfyui``."""
    return respelled(unet, folder, lambda module, tensor: f"diffusion_model.{module}.{tensor}")


def attention_processors(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As diffusers wrote before it used PEFT."""
    tensors = {}
    for name, tensor in get_peft_model_state_dict(unet).items():
        module, side = name.removesuffix(".weight").rsplit(".lora_", 1)
        place, projection = module.removesuffix(".0").rsplit(".", 1)
        direction = {"A": "down", "B": "up"}[side]
        tensors[f"unet.{place}.processor.{projection}_lora.{direction}.weight"] = tensor
    save_file(tensors, folder / NAME)
    return folder / NAME


def peft_folder(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As ``PeftModel.save_pretrained``, with endings for targets."""
    targets = {name.rsplit(".lora_", 1)[0] for name in get_peft_model_state_dict(unet)}
    endings = sorted({target.removesuffix(".0").rsplit(".", 1)[1] for target in targets})
    endings = ["to_out.0" if ending == "to_out" else ending for ending in endings]
    attached = unet.peft_config["default"]
    plain = UNet2DConditionModel.from_config(unet.config)
    config = LoraConfig(r=attached.r, lora_alpha=attached.lora_alpha, target_modules=endings)
    model = get_peft_model(plain, config)
    for name, tensor in get_peft_model_state_dict(unet).items():
        module, side = name.removesuffix(".weight").rsplit(".lora_", 1)
        matrix = model.base_model.model.get_submodule(f"{module}.lora_{side}.default")
        matrix.weight.data.copy_(tensor)
    model.save_pretrained(folder)
    return folder


WRITERS = [
    (diffusers_script, ATTENTION),
    (simpletuner, SPEC),
    (kohya, SPEC),
    (comfyui, SPEC),
    (attention_processors, ATTENTION),
    (peft_folder, SPEC),
]


def name_of(value: object) -> str:
    return value.__name__ if callable(value) else ""
