"""Checkpoints: a tree of tensors and plain values, as one safetensors and one JSON file.

A checkpoint is written under another name and then renamed, and renamed again before it is
deleted, so that one with its final name is complete. A disk may still damage it afterwards, so its
checksums are checked when it is read. Nothing is ever unpickled.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adapters.atomic import replace_folder, writing_to
from adapters.base.tensor_files import save_tensors
from adapters.checksums import SUMS, find_damage, write_sums
from adapters.errors import UserError, listed

FORMAT = 5
"""The version of a checkpoint's contents. Since 2, each tensor starts an optimizer block; since 3,
it holds the validations so far; since 4, also the settings that they depend on; since 5, checksums
of its files, and what the run trains on."""

TENSORS, TREE = "state.safetensors", "state.json"
"""The files of a checkpoint, beside their checksums."""

PARTIAL = "partial"
"""The folder of what is being written or deleted."""

DAMAGED = "damaged-"
"""The beginning of the names of checkpoints that were passed over."""


class DamagedError(UserError):
    """A checkpoint that is not as it was written."""

    def __init__(self, folder: Path, reason: str) -> None:
        self.reason = " ".join(reason.split())
        """Its fault, in a few words."""
        super().__init__(
            f"The checkpoint {folder} is damaged ({self.reason}); delete that folder to continue"
            " from the checkpoint before it."
        )


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a stage."""

    folder: Path | None
    """Its folder; ``None``: no checkpoint is whole."""
    tree: dict[str, Any]
    """The tree that was saved; empty without a folder."""
    passed_over: dict[Path, str]
    """Newer ones that are damaged, each with the reason."""

    @property
    def message(self) -> str | None:
        """The line on what was passed over and why; ``None``: nothing was."""
        if not self.passed_over:
            return None
        names = listed([f"{each.name}: {why}" for each, why in self.passed_over.items()], 4)
        root = next(iter(self.passed_over)).parent
        if self.folder is None:
            return f"No checkpoint in {root} is whole ({names}): training begins again at step 0."
        return f"Damaged checkpoints in {root} are passed over ({names}) for {self.folder.name}."


def save_checkpoint(root: Path, step: int, tree: dict[str, Any], keep: int) -> Path:
    """Write ``root/step-NNNNNN``, then delete all but the newest ``keep`` checkpoints.

    Raises:
        UserError: if the disk cannot be written to, or a tensor is not finite.
    """
    folder, partial = root / f"step-{step:06d}", root / PARTIAL
    if broken := _find_broken(tree):
        raise UserError(
            f"{folder} was not written, as the training of step {step} has left NaN or infinite"
            f" values in {broken}; lower optimizer.learning_rate or set optimizer.max_grad_norm,"
            f" and go on from the newest checkpoint in {root}."
        )
    shutil.rmtree(partial, ignore_errors=True)
    new = partial / "new"
    with writing_to(folder):
        new.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        document = json.dumps({"format": FORMAT, "tree": _encode(tree, tensors)})
        save_tensors(new / TENSORS, tensors)
        (new / TREE).write_text(document, encoding="utf-8")
        write_sums(new, (TENSORS, TREE))
        replace_folder(new, folder)
        for old in list_checkpoints(root)[:-keep]:
            os.replace(old, partial / old.name)
        shutil.rmtree(partial)
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """List the folders of complete checkpoints in ``root``, oldest first."""
    steps = {folder: folder.name.removeprefix("step-") for folder in root.glob("step-*")}
    return sorted((f for f in steps if steps[f].isdecimal()), key=lambda f: int(steps[f]))


def is_whole(folder: Path) -> bool:
    """Tell whether a checkpoint's files are as they were written."""
    try:
        return find_damage(folder, (TENSORS, TREE)) is None
    except OSError:
        return False


def find_newest(root: Path, needs: Collection[str] = ()) -> Found:
    """Find the newest checkpoint that is whole and has all entries that are needed.

    Raises:
        UserError: if one that would be it has another :data:`FORMAT`, or cannot be read.
    """
    passed_over: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(root)):
        try:
            tree = load_checkpoint(folder)
            if missing := [key for key in needs if key not in tree]:
                raise DamagedError(folder, f"{TREE} has no {listed(missing)}")
        except DamagedError as error:
            passed_over[folder] = error.reason
            continue
        return Found(folder, tree, passed_over)
    return Found(None, {}, passed_over)


def set_aside(found: Found) -> None:
    """Rename the checkpoints that were passed over, so that they are neither found nor counted.

    Those of an interrupted write or deletion, which nothing needs, are deleted.
    """
    for folder in found.passed_over:
        place = folder.with_name(DAMAGED + folder.name)
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):  # on a disk that cannot be written to, training says so soon
            os.replace(folder, place)
    if found.folder is not None:
        shutil.rmtree(found.folder.with_name(PARTIAL), ignore_errors=True)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the tree that was saved, with its tensors on the CPU.

    Raises:
        DamagedError: if files are missing or not as they were written, or a tensor is not finite.
        UserError: if they have another :data:`FORMAT`, or must not be read.
    """
    try:
        if (folder / SUMS).exists() and (damage := find_damage(folder, (TENSORS, TREE))):
            raise DamagedError(folder, damage)
        document = json.loads((folder / TREE).read_text(encoding="utf-8"))
        found = document.get("format", 1)
        if found != FORMAT:
            raise UserError(
                f"The checkpoint {folder} has format {found}, but this version can only continue"
                f" from format {FORMAT}; finish the run with the version that began it, or delete"
                " its checkpoints to start over."
            )
        if not (folder / SUMS).exists():
            raise DamagedError(folder, f"{SUMS} is missing")
        tree = _decode(document["tree"], load_file(folder / TENSORS))
    except PermissionError as error:
        raise UserError(
            f"The checkpoint {folder} must not be read ({error.strerror}); give this user the right"
            " to read it."
        ) from error
    except DECODING_ERRORS as error:
        raise DamagedError(folder, str(error) or type(error).__name__) from error
    if broken := _find_broken(tree):
        raise DamagedError(folder, f"NaN or infinite values in {broken}")
    return tree


DECODING_ERRORS = (
    *(OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError),
    SafetensorError,
)
"""The errors that files raise that hold something else than a checkpoint's."""


def _list_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """List all tensors of a tree, each with its path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _list_tensors(item, f"{name}.{key}" if name else str(key))


def _find_broken(tree: Any) -> str:
    """Name the tensors of a tree that hold values other than numbers; empty: none does."""
    tensors = ((name, t) for name, t in _list_tensors(tree) if t.is_floating_point())
    return listed([name for name, tensor in tensors if not tensor.isfinite().all()], 2)


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
