"""Loading a UNet's weights straight to where they are used, quantised on the way.

Tensors are read one by one from memory-mapped safetensors files, so host memory holds no second
copy of the model, and a device never holds more of the full-precision weights than a few layers.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn

from unets.blocks import fuse_blocks
from unets.frozen import FORMATS, freeze, quantisable, quantise

READERS = 4
"""How many threads read weights; each holds one tensor at a time."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions of weights that are not quantised."""


def empty_unet(
    config: dict[str, Any], precision: str, device: torch.device
) -> UNet2DConditionModel:
    """A frozen UNet without values, in the layout that :func:`load_unet` fills.

    Args:
        config: the UNet's configuration.
        precision: ``fp32``, ``bf16``, ``fp16``; or ``int8`` or ``nf4``, whose other weights and
            arithmetic are :func:`compute_dtype`.
        device: where it will run; off the CPU its blocks are fused.

    Returns:
        A UNet on the meta device; weights that will be quantised are still in full precision.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    nn.Module.to(unet, compute_dtype(precision, device)).eval()  # diffusers' own warns
    freeze(unet)
    if device.type != "cpu":
        fuse_blocks(unet)
    return unet


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The precision that a UNet computes in; of quantised ones bf16, and fp32 on a CPU."""
    if precision in FORMATS:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return PRECISIONS[precision]


def load_unet(
    folder: Path, precision: str, device: torch.device, variant: str | None = None
) -> UNet2DConditionModel:
    """The frozen UNet of a folder in diffusers' layout, evaluating.

    Args:
        folder: with ``config.json`` and safetensors weights, in one file or several.
        precision: see :func:`empty_unet`.
        device: where to.
        variant: the weights' variant, such as ``fp16``.

    Raises:
        OSError, ValueError: where files are missing, damaged or not those of the configuration.
    """
    config = UNet2DConditionModel.load_config(folder)
    unet = empty_unet(config, precision, device)
    place = _placement(unet, precision, device, device)
    names = set(unet.state_dict())
    found = set()
    for file in weight_files(folder, variant):
        with safe_open(file, "pt") as opened:
            keys = set(opened.keys())
        found |= keys & names
        with ThreadPoolExecutor(READERS) as pool:
            read = partial(_read, file, place=place)
            list(pool.map(read, _shares(sorted(keys & names))))
    if missing := sorted(names - found):
        raise ValueError(
            f"{folder} lacks {len(missing)} of the weights that its config.json asks for, such as"
            f" {missing[0]}"
        )
    return unet


def blank_unet(
    config: dict[str, Any], precision: str, device: torch.device
) -> UNet2DConditionModel:
    """What :func:`load_unet` gives on a device, without values and on the meta device."""
    unet = empty_unet(config, precision, device)
    place = _placement(unet, precision, device, torch.device("meta"))
    for name, weight in unet.state_dict().items():
        place(name, weight)
    return unet


def _placement(
    unet: UNet2DConditionModel, precision: str, device: torch.device, target: torch.device
) -> Callable[[str, Tensor], None]:
    """A function that puts a weight, by its name, where it is used on a device.

    Args:
        unet: of :func:`empty_unet`.
        precision: that of it.
        device: decides on the layout.
        target: where the weights go: to the device, or the meta device in its stead.
    """
    quantised = set(quantisable(unet)) if precision in FORMATS else set()
    dtype = compute_dtype(precision, device)
    layout = torch.contiguous_format if device.type == "cpu" else torch.channels_last

    def place(name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = unet.get_submodule(path)
        wanted = module.get_parameter(leaf).shape
        if tensor.shape != wanted:
            raise ValueError(
                f"{name} has the shape {list(tensor.shape)}, not {list(wanted)} as config.json says"
            )
        tensor = tensor.to(target, dtype, copy=True)
        if leaf == "weight" and path in quantised:
            quantise(module, tensor, precision, dtype)
            return
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=layout)
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))

    return place


def _read(file: Path, names: list[str], place: Callable[[str, Tensor], None]) -> None:
    with safe_open(file, "pt") as opened:
        for name in names:
            place(name, opened.get_tensor(name))


def _shares(names: list[str]) -> Iterator[list[str]]:
    return (names[start::READERS] for start in range(READERS))


def hub_patterns(variant: str | None) -> list[str]:
    """The files of a hub repository's UNet folder that :func:`load_unet` reads."""
    stem, end = SAFETENSORS_WEIGHTS_NAME.split(".")
    weights = f"{stem}*.{variant}*" if variant else f"{stem}.{end}"
    shards = () if variant else (f"{stem}-*.{end}", SAFE_WEIGHTS_INDEX_NAME)
    return ["config.json", weights, *shards]


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files that hold a model's weights.

    Raises:
        OSError: where there are none, or one of several is missing.
    """
    mark = f".{variant}" if variant else ""
    single = folder / SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", f"{mark}.safetensors")
    index = folder / SAFE_WEIGHTS_INDEX_NAME.replace(".json", f"{mark}.json")
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"neither {single} nor {index} is there")
    shards = json.loads(index.read_text())["weight_map"].values()
    files = [folder / name for name in sorted(set(shards))]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{missing[0]}, which {index.name} names, is not there")
    return files
