"""Loading of a model's weights straight to the device, quantised on the way.

Tensors are read one by one from memory-mapped safetensors files, so that main memory holds no
second copy of the model and the device holds at most a few layers in full precision.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from unets.blocks import fuse_blocks
from unets.frozen import FORMATS, freeze, quantisable, quantise
from unets.precision import compute_dtype

READERS = 4
"""The number of threads that read weights, each holding one tensor at a time."""

Place: TypeAlias = Callable[[str, Tensor], None]
"""A function that puts a weight, given its name, into its layer."""


def empty_unet(
    config: dict[str, Any], precision: str, device: torch.device
) -> UNet2DConditionModel:
    """Build a frozen UNet without values, on the meta device, for :func:`load_unet` to fill.

    Arithmetic, and the weights that ``int8`` and ``nf4`` do not quantise, are in
    :func:`compute_dtype`; weights still to be quantised are in full precision. Blocks are fused,
    other than for a CPU.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    nn.Module.to(unet, compute_dtype(precision, device)).eval()  # diffusers' own to() warns
    freeze(unet)
    if device.type != "cpu":
        fuse_blocks(unet)
    return unet


def load_unet(
    config: dict[str, Any], files: Sequence[Path], precision: str, device: torch.device
) -> UNet2DConditionModel:
    """Load a frozen UNet from safetensors files, in evaluation mode, see :func:`empty_unet`.

    Raises:
        OSError, ValueError: if files are missing or damaged, or do not fit the configuration.
    """
    unet = empty_unet(config, precision, device)
    fill(unet, files, placement(unet, precision, compute_dtype(precision, device), device))
    return unet


def blank_unet(
    config: dict[str, Any], precision: str, device: torch.device
) -> UNet2DConditionModel:
    """Build, without values, on the meta device, the UNet that :func:`load_unet` would load."""
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
    """Return a function that puts a weight, given its name, into a model with frozen layers.

    ``int8`` and ``nf4`` quantise the layers of :func:`unets.frozen.quantisable`; all other weights,
    and the arithmetic, have the dtype. The memory layout is that of ``like``, or else ``device``.
    """
    quantised = set(quantisable(model)) if precision in FORMATS else set()
    on_cpu = (like or device).type == "cpu"  # channels_last gains nothing there
    layout = torch.contiguous_format if on_cpu else torch.channels_last

    def place(name: str, tensor: Tensor) -> None:
        """Put a weight into its layer, quantised if it should be.

        Raises:
            ValueError: if its shape does not fit, or it has values that are NaN or infinite.
        """
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        wanted = module.get_parameter(leaf).shape
        if tensor.shape != wanted:
            raise ValueError(
                f"{name} has the shape {list(tensor.shape)}, not {list(wanted)} as config.json says"
            )
        tensor = tensor.to(device, dtype, copy=True)
        if not tensor.is_meta and not is_finite(tensor):
            raise ValueError(f"{name} has values that are NaN or infinite, so the file is damaged")
        if leaf == "weight" and path in quantised:
            quantise(module, tensor, precision, dtype)
            return
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=layout)
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))

    return place


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values are numbers, neither NaN nor infinite."""
    low, high = tensor.aminmax()  # takes no memory, and a fortieth of the time of isfinite
    return bool(low.isfinite() & high.isfinite())


def fill(
    model: nn.Module, files: Sequence[Path], place: Place, *, optional: Collection[str] = ()
) -> None:
    """Read a model's weights from safetensors files into their place, several at a time.

    Raises:
        OSError, ValueError: if files are missing, or weights that are not ``optional``.
    """

    def read(file: Path, names: Sequence[str]) -> None:
        with safe_open(file, "pt") as opened:
            for name in names:
                try:
                    place(name, opened.get_tensor(name))
                except ValueError as error:
                    raise ValueError(f"{file}: {error}") from error

    names, found = set(model.state_dict()), set()
    for file in files:
        with safe_open(file, "pt") as opened:
            here = sorted(names.intersection(opened.keys()))
        found.update(here)
        with ThreadPoolExecutor(READERS) as pool:
            shares = [here[start::READERS] for start in range(READERS)]
            list(pool.map(partial(read, file), shares))  # list() raises what a reader raised
    if missing := sorted(names - found - set(optional)):
        raise ValueError(
            f"{len(missing)} of the weights that its config.json asks for are not in"
            f" {', '.join(map(str, files))}, such as {missing[0]}"
        )
