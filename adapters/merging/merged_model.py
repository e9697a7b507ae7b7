"""A base's folder with adapters merged into its UNet, written one weight at a time."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor

from adapters.atomic import write_text
from adapters.base.component_files import CONFIG
from adapters.base.source import Source
from adapters.base.stored_unet import StoredUNet
from adapters.base.tensor_files import write_tensors
from adapters.errors import UserError
from adapters.files.licence import licence_files
from adapters.files.model_card import CARD, merged_card
from adapters.files.stage_adapter import StageAdapter, merged_weight
from unets.loading import PRECISIONS

UNET = "unet"
"""The folder of the UNet within a model's folder."""


@dataclass(frozen=True)
class Storage:
    """How a merged model lies on the disk."""

    precision: str | None
    """That of the UNet's weights, a name of :data:`PRECISIONS`; ``None``: as the base has them."""
    variant: str | None
    """The variant that the UNet's files are named after, such as ``fp16``."""
    max_shard_size: str
    """The size of the largest file, such as ``5GB``."""
    link: bool
    """Whether files that do not change are hard links to the base's, which takes no space."""

    @property
    def weights_name(self) -> str:
        """The name of a file of weights, as diffusers has it; ``{suffix}`` tells shards apart."""
        stem, end = SAFETENSORS_WEIGHTS_NAME.rsplit(".", 1)
        return f"{stem}{self._mark}{{suffix}}.{end}"

    @property
    def index_name(self) -> str:
        """The name of the file that says in which shard a weight is."""
        stem, end = SAFE_WEIGHTS_INDEX_NAME.rsplit(".", 1)
        return f"{stem}{self._mark}.{end}"

    @property
    def _mark(self) -> str:
        return f".{self.variant}" if self.variant else ""


@dataclass(frozen=True)
class MergedModel:
    """A stage's model with adapters merged into its UNet, before it is written."""

    source: Source
    unet: StoredUNet
    adapters: Sequence[tuple[StageAdapter, float]]
    """Adapters that fit the UNet, and how much of each."""
    storage: Storage

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Shapes and precisions of the UNet's weights as they will be written."""
        precision = self.storage.precision
        return {
            name: weight if precision is None else weight.to(PRECISIONS[precision])
            for name, weight in self.unet.weights.items()
        }

    @cached_property
    def shards(self) -> StateDictSplit:
        """Which weights go to which file.

        Raises:
            UserError: where the size of shards cannot be understood.
        """
        size = self.storage.max_shard_size
        try:
            return split_torch_state_dict_into_shards(
                self.weights, filename_pattern=self.storage.weights_name, max_shard_size=size
            )
        except ValueError as error:
            raise UserError(
                f"--max-shard-size must be a size with its unit, such as 5GB (got {size!r})."
            ) from error

    @cached_property
    def carried(self) -> dict[Path, Path]:
        """The files that do not change, by their place in the new folder: all but UNet and card."""
        base = self.source.folder
        files: dict[Path, Path] = {}
        for directory, folders, names in os.walk(base, followlinks=True):
            inside = Path(directory).relative_to(base)
            top = inside == Path()
            folders[:] = [name for name in folders if name[0] != "." and not (top and name == UNET)]
            kept = [name for name in names if name[0] != "." and not (top and name == CARD)]
            files |= {inside / name: Path(directory) / name for name in kept}
        licences = {Path(p.name): p for p in licence_files(self.source.name, self.source.revision)}
        config = {Path(UNET) / CONFIG: self.unet.folder / CONFIG}
        return licences | files | config

    @property
    def new_bytes(self) -> int:
        """How much space it takes."""
        copied = () if self.storage.link else self.carried.values()
        return sum(weight.nbytes for weight in self.weights.values()) + sum(
            path.stat().st_size for path in copied
        )

    def write(self, folder: Path, advance: Callable[[int], object]) -> None:
        """Write the model.

        Args:
            folder: where to.
            advance: is told how many bytes have been written, every now and then.

        Raises:
            UserError: where a merged weight has values that its precision cannot hold.
        """
        (folder / UNET).mkdir(parents=True)
        self._write_weights(folder / UNET, advance)
        for place, path in self.carried.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            if self.storage.link:
                linked(path, folder / place)
            else:
                shutil.copyfile(path, folder / place)
                advance(path.stat().st_size)
        write_text(folder / CARD, merged_card(self.source, self.adapters, self.storage.variant))

    @torch.no_grad()
    def _write_weights(self, folder: Path, advance: Callable[[int], object]) -> None:
        for file, names in self.shards.filename_to_tensors.items():
            blank = {name: self.weights[name] for name in names}
            write_tensors(folder / file, blank, self._merged, advance)
        if self.shards.is_sharded:
            index = {
                "metadata": self.shards.metadata,
                "weight_map": self.shards.tensor_to_filename,
            }
            text = json.dumps(index, indent=2, sort_keys=True)
            write_text(folder / self.storage.index_name, f"{text}\n")

    def _merged(self, name: str) -> Tensor:
        """A weight as it is written."""
        weight = self.unet.read(name)
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and any(module in adapter.modules for adapter, _ in self.adapters):
            weight = merged_weight(self.adapters, module, weight)
        result = weight.to(self.weights[name].dtype).contiguous()
        low, high = result.aminmax()  # takes no memory, where isfinite takes a copy
        if not (low.isfinite() and high.isfinite()):
            raise UserError(
                f"{name} has values that {result.dtype} cannot hold once merged; choose another"
                " --dtype or a lower --scale."
            )
        return result


def linked(path: Path, place: Path) -> None:
    """A hard link to a file, or a copy where the disk is another."""
    try:
        place.hardlink_to(path.resolve())
    except OSError:
        shutil.copyfile(path, place)
