"""Pickled weights, converted to safetensors once, without running any code in them."""

import hashlib
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub  # imports its parts only when they are used
from filelock import FileLock

from adapters.errors import UserError, print_once

if TYPE_CHECKING:
    from torch import Tensor


def as_safetensors(path: Path, model: str) -> Path:
    """Return weights as a safetensors file; a pickled file is converted into the cache, once.

    Raises:
        UserError: if a pickled file is damaged or holds more than tensors, or the cache cannot be
            written.
    """
    if path.suffix == ".safetensors":
        return path
    from adapters.base.tensor_files import write_tensors

    file = path.resolve()  # the hub's cache names files by their content
    identity = f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"
    folder = huggingface_hub.cached_assets_path(
        "deepfloyd-if-finetune",
        "safetensors",
        hashlib.sha256(identity.encode()).hexdigest()[:16],
        assets_dir=huggingface_hub.constants.HF_ASSETS_CACHE,
    )
    converted = folder / f"{path.stem}.safetensors"
    with FileLock(folder / ".lock"):  # only one of several processes converts
        if not _is_whole(converted):
            tensors = _read_pickled(path, model)
            write_tensors(converted, tensors, tensors.__getitem__)
            print_once(
                f"{path.parent.name} of {model}: {path.name} is converted to {converted}, once"
            )
    return converted


def _is_whole(converted: Path) -> bool:
    """Tell whether a converted file is there, with as many bytes as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(converted, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read_pickled(path: Path, model: str) -> "dict[str, Tensor]":
    """Read the tensors of a file that PyTorch has pickled, without running any code in it."""
    import torch

    from adapters.base.tensor_files import DTYPE_NAMES
    from unets.loading import is_finite

    try:
        # files from before PyTorch 1.6 are not zip archives, and cannot be mapped
        mapped = zipfile.is_zipfile(path)
        with warnings.catch_warnings(action="ignore"):  # the error below says what is wrong
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        plain = all(t.layout == torch.strided and t.dtype in DTYPE_NAMES for t in found.values())
    except Exception:  # a file that is not PyTorch's may fail anywhere in its reader
        plain = False
    if not plain:
        raise UserError(
            f"{path.parent.name}/{path.name} of {model} must be a file of PyTorch with plain"
            " tensors, but is damaged or holds something else, such as code, none of which was run;"
            " download it again, or name a model with safetensors weights."
        )
    for name, tensor in found.items():
        if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
            raise UserError(
                f"{path}: {name} has values that are NaN or infinite, so the file is damaged;"
                " download it again."
            )
    return {str(name): tensor.detach() for name, tensor in found.items()}
