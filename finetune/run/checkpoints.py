"""Checkpoints: a tree of tensors and plain values, as one safetensors and one JSON file.

A checkpoint is written under another name and then renamed, and renamed again before it is
deleted, so that one with its final name is complete. Nothing is ever unpickled.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.atomic import replace_folder, writing_to
from adapters.errors import UserError

FORMAT = 4
"""The version of a checkpoint's contents. Since 2, each tensor starts an optimizer block; since 3,
it holds the validations so far; since 4, also the settings that they depend on."""


def save_checkpoint(root: Path, step: int, tree: dict[str, Any], keep: int) -> Path:
    """Write ``root/step-NNNNNN``, then delete all but the newest ``keep`` checkpoints.

    Raises:
        UserError: if the disk cannot be written to.
    """
    folder, partial = root / f"step-{step:06d}", root / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    new = partial / "new"
    with writing_to(folder):
        new.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        document = json.dumps({"format": FORMAT, "tree": _encode(tree, tensors)})
        save_file(tensors, new / "state.safetensors")
        (new / "state.json").write_text(document, encoding="utf-8")
        replace_folder(new, folder)
        for old in list_checkpoints(root)[:-keep]:
            os.replace(old, partial / old.name)
        shutil.rmtree(partial)
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """List the folders of complete checkpoints in ``root``, oldest first."""
    steps = {folder: folder.name.removeprefix("step-") for folder in root.glob("step-*")}
    return sorted((f for f in steps if steps[f].isdecimal()), key=lambda f: int(steps[f]))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the tree that was saved, with its tensors on the CPU.

    Raises:
        UserError: if the files are damaged, or have another :data:`FORMAT`.
    """
    try:
        tensors = load_file(folder / "state.safetensors")
        document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        found = document.get("format", 1)
        tree = _decode(document["tree"], tensors) if found == FORMAT else None
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"The checkpoint {folder} is damaged ({error}); delete that folder to continue from the"
            " checkpoint before it."
        ) from error
    if tree is None:
        raise UserError(
            f"The checkpoint {folder} has format {found}, but this version can only continue from"
            f" format {FORMAT}; finish the run with the version that began it, or delete its"
            " checkpoints to start over."
        )
    assert isinstance(tree, dict)
    return tree


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a JSON value with marks for tensors, tuples and mappings; fills ``tensors``."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().clone().contiguous()
        return {"tensor": key}
    if isinstance(value, dict):  # as pairs, since keys may be numbers
        return {"mapping": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    return value


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if isinstance(value, dict):
        ((mark, content),) = value.items()
        if mark == "tensor":
            return tensors[content]
        if mark == "tuple":
            return tuple(_decode(item, tensors) for item in content)
        return {key: _decode(item, tensors) for key, item in content}
    return value
