"""Models rewritten in the layouts of published ones: variants, formats, shards."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Layout = Mapping[str, Sequence[str]]
"""File names by component; ``#`` stands for the number of a shard, ``fp16`` for half precision."""

UNET, NET = "diffusion_pytorch_model", "model"


def rewrite(model: Path, folder: Path, layout: Layout) -> None:
    """Copy a model whose weights are plain and in one file each, and store them in other layouts.

    Args:
        model: the folder to copy.
        folder: the copy.
        layout: the layouts of some components; the others keep theirs.
    """
    shutil.copytree(model, folder)
    for component, names in layout.items():
        (plain,) = (folder / component).glob("*.safetensors")
        state = load_file(plain)
        plain.unlink()
        for name in names:
            _store(state, folder / component, name)


def files_of(names: Sequence[str]) -> set[str]:
    """The names of all files that names with ``#`` stand for."""
    return {shard for name in names for shard in _shards(name)}


def _shards(name: str) -> list[str]:
    count = int(name.partition("-of-")[2][:5] or 1)
    return [name.replace("#", f"{number:05}") for number in range(1, count + 1)]


def _store(state: Mapping[str, Tensor], folder: Path, name: str) -> None:
    shards = _shards(name)
    if "fp16" in name:
        state = {key: value.half() for key, value in state.items()}
    parts = [dict(list(state.items())[n :: len(shards)]) for n in range(len(shards))]
    for shard, part in zip(shards, parts, strict=True):
        save = save_file if shard.endswith(".safetensors") else torch.save
        save(part, folder / shard)
    if len(shards) > 1:
        places = {key: shard for shard, part in zip(shards, parts, strict=True) for key in part}
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / index_of(name)).write_text(json.dumps(index))


def index_of(name: str) -> str:
    """The name of a shard index, as the library that uses such names writes it."""
    stem, end = name.replace("-#-of-00002", "").replace(".fp16", "").split(".")
    variant = ".fp16" * ("fp16" in name)
    is_old = name.endswith(f".fp16.{end}")
    return f"{stem}.{end}{variant}.index.json" if is_old else f"{stem}.{end}.index{variant}.json"
