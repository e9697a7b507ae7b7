"""Safetensors files of finite values, the same bytes for the same content.

They are written one tensor at a time, so that no file has to fit into memory. Safetensors' own
writer puts the entries of a header in another order each time.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.atomic import replacing
from adapters.errors import UserError
from unets.loading import is_finite

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in safetensors files."""

PYTORCH = {"format": "pt"}
"""The entry by which libraries recognise a file of PyTorch's tensors."""


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] = PYTORCH,
    *,
    durable: bool = True,
) -> None:
    """Write tensors that are in memory as :func:`write_tensors` does."""
    write_tensors(path, tensors, tensors.__getitem__, metadata=metadata, durable=durable)


def write_tensors(
    path: Path,
    blank: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    advance: Callable[[int], object] = lambda _: None,
    metadata: Mapping[str, str] = PYTORCH,
    *,
    durable: bool = True,
) -> None:
    """Write a safetensors file, whole or not at all, tensor by tensor.

    The shapes and dtypes are those of ``blank``, the values come from ``read``, and ``advance`` is
    called with the number of bytes written. ``metadata`` are the entries of its header, and
    ``durable`` is that of :func:`adapters.atomic.replacing`.

    Raises:
        UserError: if the file cannot be written, or a value is NaN or infinite.
    """
    # wide precisions first, so that each tensor is aligned, as safetensors' own writer does
    order = sorted(blank, key=lambda name: (-blank[name].itemsize, name))
    with replacing(path, durable=durable) as temporary, temporary.open("wb") as stream:
        stream.write(safetensors_header({name: blank[name] for name in order}, metadata))
        for name in order:
            tensor = read(name)
            if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
                raise UserError(
                    f"{path} was not written: {name} has values that are NaN or infinite; make it"
                    " again from a source without."
                )
            values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            stream.write(values.numpy().data)
            advance(values.nbytes)


def safetensors_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Build the beginning of a safetensors file, before the tensors' bytes in their order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        dtype = DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    return len(text).to_bytes(8, "little") + text
