"""The files of a model's components: which are read of those that are there, and how they come.

A component's weights may lie there in several precisions (variants) and formats, whole or in
shards. What is read is the variant that is asked for, or else the plain files; of these the
safetensors, or else the pickled ``.bin`` files, which are converted once.
"""

import hashlib
import json
import os
import re
import sys
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from filelock import FileLock
from huggingface_hub import (
    cached_assets_path,
    constants,
    get_cached_repo_tree,
    snapshot_download,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from adapters.base.hub import asking_the_hub
from adapters.base.tensor_files import DTYPES, write_tensors
from adapters.errors import UserError, listed

INDEX = DiffusionPipeline.config_name
"""The file that names a model's components."""

CONFIG = "config.json"
"""The configuration of a component with weights."""

OTHER_CONFIGS = {"tokenizer_config.json", "scheduler_config.json", "preprocessor_config.json"}
"""The configurations of those without."""

WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
    r"(\.(?P<variant>[\w-]+?))?"
    r"(-(?P<number>\d{5})-of-(?P<total>\d{5}))?"
    r"(\.(?P<old_variant>[\w-]+))?"
    r"\.(?P<format>safetensors|bin)"
)
"""Names of weights as diffusers and transformers write them: ``model.fp16.safetensors``,
``model.fp16-00001-of-00002.safetensors``, formerly ``model-00001-of-00002.fp16.safetensors``.
Each shard says how many there are, so their index, whose name has varied too, is not needed."""

SAFETENSORS_STEMS = {"pytorch_model": "model"}
"""What safetensors files are called where pickled ones have another name."""


class Form(NamedTuple):
    """How weights are stored: the precision asked for comes first, then the safer format."""

    plain: bool
    """Whether they lack the variant that is asked for."""
    pickled: bool
    shards: int
    old_names: bool
    """Whether the variant stands at the end of the shards' names."""


@dataclass(frozen=True)
class Weights:
    """The files that hold one component's weights."""

    names: tuple[str, ...]
    """In the order of shards."""
    form: Form

    @property
    def stem(self) -> str:
        """What diffusers or transformers name its safetensors files after."""
        stem = self.names[0].partition(".")[0].partition("-")[0]
        return SAFETENSORS_STEMS.get(stem, stem)


def choose_weights(component: str, names: Iterable[str], variant: str | None) -> Weights:
    """The weights to read of a component.

    Args:
        component: what messages call it.
        names: of all files in its folder.
        variant: the one to prefer, such as ``fp16``; ``None``: the plain files.

    Raises:
        FileNotFoundError: where there are neither weights of the variant nor plain ones, or a shard
            is missing.
        ValueError: where complete sets of different numbers of shards lie side by side.
    """
    found: dict[Form, dict[int, str]] = defaultdict(dict)
    others, twice = set(), []
    for match in filter(None, map(WEIGHTS.fullmatch, sorted(names))):
        own = match["variant"] or match["old_variant"]
        if own in (variant, None):
            shards, old = int(match["total"] or 1), bool(match["old_variant"])
            form = Form(own != variant, match["format"] == "bin", shards, old)
            number = int(match["number"] or 1)
            twice += [match[0], found[form][number]] if number in found[form] else []
            found[form][number] = match[0]
        else:
            others.add(own)
    if not found:
        only = f"weights of the variant {listed(sorted(others))} only" if others else "no weights"
        raise FileNotFoundError(f"its {component} has {only}")

    if twice:
        raise ValueError(
            f"the weights of its {component} lie there twice ({listed(sorted(set(twice)))}); remove"
            " all but one set"
        )

    def missing(form: Form) -> list[int]:
        return sorted(set(range(1, form.shards + 1)) - found[form].keys())

    best = min(found, key=lambda form: (form[:2], bool(missing(form)), form))
    if missing(best):
        raise FileNotFoundError(
            f"of the {best.shards} shards of its {component}, {len(missing(best))} are not there"
            f" (number {listed(map(str, missing(best)))}); only {listed(found[best].values())}"
        )
    complete = {form.shards for form in found if form[:2] == best[:2] and not missing(form)}
    if best.shards > 1 and len(counts := list(map(str, sorted(complete)))) > 1:
        raise ValueError(
            f"the weights of its {component} lie there both in {' and in '.join(counts)} shards;"
            " remove all but one set"
        )
    return Weights(tuple(found[best][number] for number in sorted(found[best])), best)


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model: a folder, or a repository of the hub that is downloaded in parts."""

    name: str
    """A folder or ``owner/name``."""
    revision: str | None = None
    variant: str | None = None
    """That of weights that are preferred."""

    @cached_property
    def root(self) -> Path:
        """The model's folder; of the hub's, that of the commit, with the model's index in it.

        Raises:
            UserError: where the hub has no such model, does not show it, or cannot be reached.
        """
        if self._is_here:
            return Path(self.name)
        with asking_the_hub(self.name):
            return Path(
                snapshot_download(self.name, revision=self.revision, allow_patterns=[INDEX])
            )

    @cached_property
    def listing(self) -> Mapping[str, int]:
        """The sizes of the repository's files in bytes, by their place in it.

        Empty where the model is a folder, or the hub has not been asked and cannot be.
        """
        if self._is_here:
            return {}
        try:
            files = get_cached_repo_tree(self.name, revision=self.root.name)
        except CachedRepoTreeNotFoundError:  # downloaded by an older client, and now offline
            return {}
        return {file.path: file.size for file in files}

    @property
    def is_listed(self) -> bool:
        """Whether it is known what files there are, rather than which are in the local cache."""
        return self._is_here or bool(self.listing)

    def has_weights(self, component: str) -> bool:
        """Whether a component is a network."""
        names = set(self._names(component))
        weights = any(map(WEIGHTS.fullmatch, names))
        return weights or (CONFIG in names and not names & OTHER_CONFIGS)

    def weights(self, component: str) -> Weights:
        """The weights to read of a component, see :func:`choose_weights`."""
        return choose_weights(component, self._names(component), self.variant)

    def places(self, component: str) -> list[str]:
        """The files that a component needs: configuration and weights, or all that it has."""
        names = self._names(component)
        if self.has_weights(component):
            names = [CONFIG, *self.weights(component).names]
        return [f"{component}/{name}" for name in names]

    def absent_bytes(self, component: str) -> list[int]:
        """The sizes of the files that a component needs and that are still to be downloaded.

        None of a folder, which need not hold any weights.
        """
        if not self.listing:
            return []
        absent = (place for place in self.places(component) if not (self.root / place).is_file())
        return [self.listing[place] for place in absent]

    def fetch(self, places: Iterable[str]) -> Path:
        """The model's folder, once these files are in it."""
        if self._is_here or not self.listing:  # then no others are to be had
            return self.root
        # the commit rather than the branch: all files of a model are of one moment
        commit = self.root.name
        wanted = list(places)
        return Path(snapshot_download(self.name, revision=commit, allow_patterns=wanted))

    def safetensors(self, component: str) -> list[Path]:
        """The safetensors files of a component's weights, downloaded or converted where need be.

        What stands in for what was asked for is told, once.

        Raises:
            UserError: where a pickled file is damaged or holds more than tensors.
        """
        weights = self.weights(component)
        folder = self.fetch(self.places(component)) / component
        if weights.form.plain:
            _say(
                f"{component} of {self.name}: no {self.variant} variant,"
                f" {'the plain file is' if len(weights.names) == 1 else 'plain files are'} read"
            )
        return [as_safetensors(folder / name, self.name) for name in weights.names]

    @contextmanager
    def plain_folder(self, components: Collection[str]) -> Iterator[Path]:
        """A folder of links to the model, for loaders that know neither fallbacks nor old names.

        It holds the model's index and these components, their weights as plain safetensors files.
        """
        with TemporaryDirectory(prefix="model-") as temporary:
            folder = Path(temporary)
            (folder / INDEX).symlink_to((self.root / INDEX).resolve())
            for component in components:
                place = folder / component
                here = (self.fetch(self.places(component)) / component).absolute()
                if not self.has_weights(component):
                    place.symlink_to(here)
                    continue
                place.mkdir()
                (place / CONFIG).symlink_to(here / CONFIG)
                _link_weights(self.safetensors(component), place, self.weights(component).stem)
            yield folder

    @property
    def _is_here(self) -> bool:
        return Path(self.name).is_dir()

    def _names(self, component: str) -> list[str]:
        if not self.listing:
            files = (self.root / component).glob("*")
            return [path.name for path in files if path.is_file()]  # a pipe would be waited for
        start = f"{component}/"
        return [place.removeprefix(start) for place in self.listing if place.startswith(start)]


def as_safetensors(path: Path, model: str) -> Path:
    """The safetensors file of a file of weights; a pickled one is converted into the cache, once.

    Args:
        path: a safetensors file, or one of PyTorch's own.
        model: the model's name, for messages.

    Raises:
        UserError: where a pickled file is damaged or holds more than tensors, or the cache cannot
            be written.
    """
    if path.suffix == ".safetensors":
        return path
    file = path.resolve()  # the hub's cache names files by their content
    identity = f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"
    folder = cached_assets_path(
        "deepfloyd-if-finetune",
        "safetensors",
        hashlib.sha256(identity.encode()).hexdigest()[:16],
        assets_dir=constants.HF_ASSETS_CACHE,
    )
    converted = folder / f"{path.stem}.safetensors"
    with FileLock(folder / ".lock"):  # of several processes, one converts
        if not converted.is_file():
            tensors = _read_pickled(path, model)
            write_tensors(converted, tensors, tensors.__getitem__)
            _say(f"{path.parent.name} of {model}: {path.name} is converted to {converted}, once")
    return converted


def _read_pickled(path: Path, model: str) -> dict[str, Tensor]:
    """The tensors of a file that PyTorch has pickled; no code in it runs."""
    try:
        # files of before PyTorch 1.6 are no archives, and cannot be mapped
        mapped = zipfile.is_zipfile(path)
        with warnings.catch_warnings(action="ignore"):  # what is wrong with it is said below
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception:  # what is not PyTorch's may fail anywhere in its reader
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and _is_plain(value)
        for name, value in found.items()
    ):
        raise UserError(
            f"{path.parent.name}/{path.name} of {model} must be a file of PyTorch with plain"
            " tensors, but is damaged or holds something else, such as code, none of which was run;"
            " download it again, or name a model with safetensors weights."
        )
    return {name: value.detach() for name, value in found.items()}


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has a place in a safetensors file."""
    here = tensor.device.type == "cpu" and tensor.layout == torch.strided
    return here and not tensor.is_quantized and tensor.dtype in DTYPES


def _link_weights(files: Sequence[Path], folder: Path, stem: str) -> None:
    """Link safetensors files as one plain file, or as shards and their index."""
    if len(files) == 1:
        (folder / f"{stem}.safetensors").symlink_to(files[0].absolute())
        return
    shard_of: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        shard = f"{stem}-{number:05}-of-{len(files):05}.safetensors"
        (folder / shard).symlink_to(file.absolute())
        with safe_open(file, "pt") as opened:
            shard_of |= dict.fromkeys(opened.keys(), shard)
    index = {"metadata": {}, "weight_map": shard_of}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


@cache
def _say(line: str) -> None:
    """Tell the user something on standard error, once; of several processes one does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)
