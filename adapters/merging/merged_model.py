"""Writing models with adapters merged into their UNets, one weight at a time."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, _add_variant
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor
from tqdm.auto import tqdm

from adapters.arguments import LARGEST_SCALE, is_scale
from adapters.atomic import check_out, new_folder, write_text
from adapters.base.component_files import CONFIG
from adapters.base.source import Source, sources_of
from adapters.base.stored_unet import StoredUNet
from adapters.base.tensor_files import write_tensors
from adapters.errors import UserError, listed, quote
from adapters.files.licence import licence_files
from adapters.files.model_card import CARD, merged_card
from adapters.files.stage_adapter import StageAdapter, merged_weight
from adapters.merging.measure import check_weights_only
from adapters.progress import Bar
from unets.loading import is_finite
from unets.precision import dtype_of

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", re.IGNORECASE)
"""The size of a file, as the hub's client reads it."""

UNET = "unet"
"""The folder of the UNet within a model's folder."""


@dataclass(frozen=True)
class Storage:
    """Settings for the files of a merged model."""

    precision: str | None = None
    """The precision of the UNet's weights, by name; ``None``: the base's."""
    variant: str | None = None
    """The variant that the UNet's files are named after, such as ``fp16``."""
    max_shard_size: str = "5GB"
    """The largest size of a file."""
    link: bool = False
    """True to make hard links to the base's unchanged files, which takes no space."""

    def check(self) -> None:
        """Raise a UserError if ``max_shard_size`` is not a size."""
        match = SIZE.fullmatch(self.max_shard_size)
        if match is None or not float(match[1]):
            raise UserError(
                "--max-shard-size must be a size with its unit, such as 5GB (got"
                f" {quote(self.max_shard_size)})."
            )


def merge(
    paths: Sequence[Path],
    out: Path,
    storage: Storage,
    *,
    scales: Sequence[float] | None,
    bases: Sequence[str],
    stage: int | None,
    revision: str | None,
    variant: str | None,
) -> list[Path]:
    """Merge adapters into their base, in a new folder that appears once it is whole.

    The base's weights are read, merged and written one at a time. Each weight W becomes
    W + scale * (W merged - W), in float32 and rounded once, as in
    :meth:`adapters.Cascade.add_adapter`; the changes of several adapters add up.

    Args:
        paths: exported folders, or other tools' files or folders.
        out: the new folder. One stage is written to it, two to ``stage_1`` and ``stage_2`` in it.
        storage: precision, names and sizes of the files.
        scales: a scale for each adapter, or one for all; ``None``: 1.
        bases: a model for each stage; without any, those that the adapters name.
        stage: merge this stage only; ``None``: all that have an adapter and a base.
        revision: the bases' hub revision; ``None``: the adapter's own.
        variant: the variant of the bases' weights.

    Returns:
        The folders of the models.
    """
    check_out(out, "new folder")
    each = _scale_each(scales, len(paths))
    storage.check()
    adapters = [StageAdapter.load_all(path) for path in paths]
    sources = sources_of(bases, revision, variant) or _own_bases(adapters, revision, variant)
    sources = {number: s for number, s in sources.items() if stage in (None, number)}
    unets = {number: StoredUNet.of(source) for number, source in sources.items()}
    merged = _sort_by_stage(adapters, each, unets, say_left_out=stage is None)
    models = {
        number: MergedModel(sources[number], unets[number], merged[number], storage)
        for number in sorted(merged)
    }
    inside = {number: f"stage_{number}" if len(models) > 1 else "." for number in models}
    total = sum(model.new_bytes for model in models.values())
    with new_folder(out) as new:
        if (free := shutil.disk_usage(new).free) < total:
            raise UserError(
                f"{out} needs {tqdm.format_sizeof(total, 'B')} of disk space, but only"
                f" {tqdm.format_sizeof(free, 'B')} is free; free some space, or use --link."
            )
        with Bar(total=total, unit="B", unit_scale=True, desc="Merging", delay=1) as progress:
            for number, model in models.items():
                model.write(new / inside[number], progress.update)
    return [out / place for place in inside.values()]


def _scale_each(scales: Sequence[float] | None, count: int) -> list[float]:
    """Return a scale for each of ``count`` adapters, from as many scales or only one."""
    given = list(scales or [1.0])
    if len(given) not in (1, count) or not all(map(is_scale, given)):
        raise UserError(
            f"--scale must be a number for all adapters, or one for each of the {count}, from"
            f" -{LARGEST_SCALE} to {LARGEST_SCALE} (got {listed(map(str, given))})."
        )
    return given * (count // len(given))


def _own_bases(
    adapters: Sequence[Sequence[StageAdapter]], revision: str | None, variant: str | None
) -> dict[int, Source]:
    """Find the bases that adapters name, by stage; the first adapter of a stage decides."""
    infos = [adapter.info for stages in adapters for adapter in stages if adapter.info]
    if not infos:
        raise UserError("The adapters do not say which base they were trained on; give --base.")
    return {
        info.stage: Source(info.base_model, info.stage, revision or info.base_revision, variant)
        for info in reversed(infos)
    }


def _sort_by_stage(
    adapters: Sequence[Sequence[StageAdapter]],
    scales: Sequence[float],
    unets: Mapping[int, StoredUNet],
    *,
    say_left_out: bool,
) -> dict[int, list[tuple[StageAdapter, float]]]:
    """Sort adapters and their scales by stage, and check that they belong to these bases."""
    configs = {number: unet.unet.config for number, unet in unets.items()}
    merged: dict[int, list[tuple[StageAdapter, float]]] = {}
    left_out = []
    for stages, scale in zip(adapters, scales, strict=True):
        numbers = [adapter.stage_among(configs) for adapter in stages]
        if not set(numbers) & set(unets):
            raise UserError(
                f"{stages[0].folder} is an adapter of Stage {numbers[0]}, but no base of that"
                " stage was given; name one with --base, or choose another --stage."
            )
        for number, adapter in zip(numbers, stages, strict=True):
            if number in unets:
                adapter.check_base(unets[number].signature, unets[number].name)
                check_weights_only(adapter)
                merged.setdefault(number, []).append((adapter, scale))
            else:
                left_out.append(f"{adapter.folder} is of Stage {number} and was left out")
    for adapter_left_out in left_out if say_left_out else ():
        tqdm.write(f"{adapter_left_out}; to merge it, name its base with --base.", file=sys.stderr)
    return merged


@dataclass(frozen=True)
class MergedModel:
    """A stage's model with adapters merged into its UNet, before it is written."""

    source: Source
    unet: StoredUNet
    adapters: Sequence[tuple[StageAdapter, float]]
    """Adapters that fit the UNet, each with its scale."""
    storage: Storage

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Shapes and precisions of the UNet's weights as they will be written."""
        precision = self.storage.precision
        return {
            name: weight if precision is None else weight.to(dtype_of(precision))
            for name, weight in self.unet.weights.items()
        }

    @cached_property
    def shards(self) -> StateDictSplit:
        """The weights of each file."""
        size = self.storage.max_shard_size
        name = Path(_add_variant(SAFETENSORS_WEIGHTS_NAME, self.storage.variant))
        pattern = f"{name.stem}{{suffix}}{name.suffix}"
        return split_torch_state_dict_into_shards(
            self.weights, filename_pattern=pattern, max_shard_size=size
        )

    @cached_property
    def copied(self) -> dict[Path, Path]:
        """Unchanged files by their place in the new folder: all but UNet weights and card."""
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
        """The disk space that it takes, in bytes."""
        copied = () if self.storage.link else self.copied.values()
        return sum(weight.nbytes for weight in self.weights.values()) + sum(
            path.stat().st_size for path in copied
        )

    def write(self, folder: Path, advance: Callable[[int], object]) -> None:
        """Write the model, calling ``advance`` with the bytes written since its last call.

        Raises:
            UserError: if a merged weight has values that its precision cannot hold.
        """
        (folder / UNET).mkdir(parents=True)
        self._write_weights(folder / UNET, advance)
        for place, path in self.copied.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            if self.storage.link:
                _link(path, folder / place)
            else:
                shutil.copyfile(path, folder / place)
                advance(path.stat().st_size)
        write_text(folder / CARD, merged_card(self.source, self.adapters, self.storage.variant))

    @torch.no_grad()
    def _write_weights(self, folder: Path, advance: Callable[[int], object]) -> None:
        for file, names in self.shards.filename_to_tensors.items():
            blank = {name: self.weights[name] for name in names}
            write_tensors(folder / file, blank, self._merge, advance)
        if self.shards.is_sharded:
            places = self.shards.tensor_to_filename
            index = {"metadata": self.shards.metadata, "weight_map": places}
            text = json.dumps(index, indent=2, sort_keys=True)
            name = _add_variant(SAFE_WEIGHTS_INDEX_NAME, self.storage.variant)
            write_text(folder / name, f"{text}\n")

    def _merge(self, name: str) -> Tensor:
        """Merge the adapters into a weight, in the precision in which it is written."""
        weight = self.unet.read(name)
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and any(module in adapter.modules for adapter, _ in self.adapters):
            weight = merged_weight(self.adapters, module, weight)
        result = weight.to(self.weights[name].dtype).contiguous()
        if not is_finite(result):
            raise UserError(
                f"{name} has values that {result.dtype} cannot hold once merged; choose another"
                " --dtype or a lower --scale."
            )
        return result


def _link(path: Path, place: Path) -> None:
    """Make a hard link to a file, or a copy if it is on another disk."""
    try:
        place.hardlink_to(path.resolve())
    except OSError:
        shutil.copyfile(path, place)
