"""Loading a model's weights straight to where they are used, quantised on the way.

Tensors are read one by one from memory-mapped safetensors files, so host memory holds no second
copy of the model, and a device never holds more of the full-precision weights than a few layers.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from unets.blocks import fuse_blocks
from unets.frozen import FORMATS, freeze, quantisable, quantise

READERS = 4
"""How many threads read weights; each holds one tensor at a time."""

Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
"""What a model's weights are kept in."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions of weights that are not quantised."""

Place: TypeAlias = Callable[[str, Tensor], None]
"""Puts a weight, by its name, where it is used."""


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


def automatic_precision(device: torch.device) -> Precision:
    """What suits a device: fp32 on a CPU, where it is the faster one, and bf16 elsewhere."""
    return "fp32" if device.type == "cpu" else "bf16"


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The precision that a UNet computes in; of quantised ones bf16, and fp32 on a CPU."""
    if precision in FORMATS:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return PRECISIONS[precision]


def load_unet(
    config: dict[str, Any], files: Sequence[Path], precision: str, device: torch.device
) -> UNet2DConditionModel:
    """The frozen UNet of a configuration, evaluating.

    Args:
        config: the UNet's configuration.
        files: safetensors files with its weights.
        precision: see :func:`empty_unet`.
        device: where to.

    Raises:
        OSError, ValueError: where files are missing, damaged or not those of the configuration.
    """
    unet = empty_unet(config, precision, device)
    fill(unet, files, placement(unet, precision, compute_dtype(precision, device), device))
    return unet


def blank_unet(
    config: dict[str, Any], precision: str, device: torch.device
) -> UNet2DConditionModel:
    """What :func:`load_unet` gives on a device, without values and on the meta device."""
    unet = empty_unet(config, precision, device)
    dtype = compute_dtype(precision, device)
    place = placement(unet, precision, dtype, torch.device("meta"), like=device)
    for name, weight in unet.state_dict().items():
        place(name, weight)
    return unet


def placement(
    model: nn.Module,
    precision: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    like: torch.device | None = None,
) -> Place:
    """A function that puts a weight, by its name, into a model whose layers are frozen.

    Args:
        model: on the meta device.
        precision: ``int8`` and ``nf4`` quantise what :func:`unets.frozen.quantisable` names.
        dtype: of all other weights, and of what the model computes in.
        device: where the weights go.
        like: the device whose memory layout they have; ``None``: that device.
    """
    quantised = set(quantisable(model)) if precision in FORMATS else set()
    on_cpu = (like or device).type == "cpu"
    layout = torch.contiguous_format if on_cpu else torch.channels_last

    def place(name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        wanted = module.get_parameter(leaf).shape
        if tensor.shape != wanted:
            raise ValueError(
                f"{name} has the shape {list(tensor.shape)}, not {list(wanted)} as config.json says"
            )
        tensor = tensor.to(device, dtype, copy=True)
        if leaf == "weight" and path in quantised:
            quantise(module, tensor, precision, dtype)
            return
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=layout)
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))

    return place


def fill(
    model: nn.Module, files: Sequence[Path], place: Place, *, optional: Collection[str] = ()
) -> None:
    """Read a model's weights, several at a time.

    Args:
        model: says which weights there are.
        files: safetensors files that hold them.
        place: takes the weights.
        optional: names of weights that may be missing.

    Raises:
        OSError, ValueError: where files or weights are missing.
    """
    names, found = set(model.state_dict()), set()
    for file in files:
        with safe_open(file, "pt") as opened:
            here = sorted(names.intersection(opened.keys()))
        found.update(here)
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(partial(_read, file, place=place), _shares(here)))
    if missing := sorted(names - found - set(optional)):
        raise ValueError(
            f"{len(missing)} of the weights that its config.json asks for are not in"
            f" {', '.join(map(str, files))}, such as {missing[0]}"
        )


def _read(file: Path, names: list[str], place: Place) -> None:
    with safe_open(file, "pt") as opened:
        for name in names:
            place(name, opened.get_tensor(name))


def _shares(names: list[str]) -> Iterator[list[str]]:
    return (names[start::READERS] for start in range(READERS))
