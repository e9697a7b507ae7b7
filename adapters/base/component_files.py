"""The files of a model's components: choosing, downloading and converting them.

Weights of the requested variant are read, or else the plain files; of either, the safetensors
files, or else the pickled ``.bin`` files, which are converted once.
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
from typing import TYPE_CHECKING, Any, NamedTuple

import huggingface_hub  # imports its parts only when they are used
from filelock import FileLock
from huggingface_hub.errors import CachedRepoTreeNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from adapters.base.hub import asking_the_hub
from adapters.errors import UserError, listed

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model_index.json"
"""The file that names a model's components."""

CONFIG = "config.json"
"""The configuration of a component with weights."""

OTHER_CONFIGS = {"tokenizer_config.json", "scheduler_config.json", "preprocessor_config.json"}
"""The configurations of components without weights."""

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

LOADING_ERRORS = (
    *(OSError, ValueError, SafetensorError),
    *(TypeError, AttributeError, KeyError, NotImplementedError, StrictDataclassError),
)
"""Errors that diffusers and transformers raise if files are missing or hold something else."""


class Form(NamedTuple):
    """A way of storing weights; the preferred form sorts first."""

    is_plain: bool
    """True if the weights lack the requested variant."""
    is_pickled: bool
    shards: int
    has_old_names: bool
    """True if the variant stands at the end of the shards' names."""
    stem: str


def choose_weights(
    component: str, names: Iterable[str], variant: str | None
) -> tuple[list[str], Form]:
    """Choose from the names of a component's files those of its weights, in the order of shards.

    Raises:
        FileNotFoundError: if there are neither weights of the variant nor plain ones, or a shard is
            missing.
        ValueError: if two complete sets lie side by side.
    """
    sets: dict[Form, dict[int, str]] = defaultdict(dict)
    others = set()
    for match in filter(None, map(WEIGHTS.fullmatch, sorted(names))):
        own, old = match["variant"] or match["old_variant"], bool(match["old_variant"])
        if own not in (variant, None):
            others.add(own)
            continue
        pickled, shards = match["format"] == "bin", int(match["total"] or 1)
        form = Form(own != variant, pickled, shards, old, match["stem"])
        sets[form][int(match["number"] or 1)] = match[0]
    if not sets:
        only = f"only weights of the variant {listed(sorted(others))}" if others else "no weights"
        raise FileNotFoundError(f"its {component} has {only}")
    missing = {form: sorted({*range(1, form.shards + 1)} - sets[form].keys()) for form in sets}
    best = min(sets, key=lambda form: (form[:2], bool(missing[form]), form))
    files = sets[best]
    if missing[best]:
        raise FileNotFoundError(
            f"of the {best.shards} shards of its {component}, {len(missing[best])} are missing"
            f" (number {listed(map(str, missing[best]))}); there are only {listed(files.values())}"
        )
    for form, rival in sets.items():
        # a whole file is read rather than shards, and newer names rather than old ones
        is_rival = form.shards != best.shards > 1 or form[:4] == best[:4]
        if form[:2] == best[:2] and form != best and not missing[form] and is_rival:
            raise ValueError(
                f"its {component} has two sets of weights, {listed(files.values())} and"
                f" {listed(rival.values())}; remove one of them"
            )
    return [files[number] for number in sorted(files)], best


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model: a folder, or a hub repository that is downloaded in parts.

    All properties and methods raise a UserError if there is no such model, the hub does not show
    it or cannot be reached, or files are missing or damaged.
    """

    name: str
    """A folder or ``owner/name``."""
    revision: str | None = None
    variant: str | None = None
    """The preferred variant of the weights."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn errors over missing or damaged files into a UserError."""
        try:
            yield
        except LOADING_ERRORS as error:
            raise UserError(
                f"The model {self.name!r} cannot be loaded; check its name, revision and variant,"
                " and on the hub accept its licence and log in (hf auth login):"
                f" {' '.join(str(error).split())}"
            ) from error

    @cached_property
    def root(self) -> Path:
        """The model's folder; for a hub model, that of its commit in the cache, with the index."""
        if self._is_here:
            return Path(self.name)
        if self.name.count("/") != 1:
            raise UserError(
                f"The model {self.name!r} is neither a folder that exists nor a hub name"
                " (owner/name, owner/name@revision); correct the path."
            )
        with asking_the_hub(self.name):
            return self._download(self.revision, [INDEX])

    @cached_property
    def index(self) -> dict[str, Any]:
        """The model's index: its components by name."""
        return self.read_config(INDEX)

    @property
    def parts(self) -> dict[str, str]:
        """The model's components by name, and the class of each."""
        # a name is also that of a folder, which must not lie outside of the model
        return {
            name: str(value[-1])
            for name, value in self.index.items()
            if name.isidentifier() and isinstance(value, list) and value and value[-1]
        }

    @cached_property
    def listing(self) -> Mapping[str, int]:
        """The sizes of the repository's files in bytes, by their path in it.

        Empty if the model is a folder, or if the hub was never asked and cannot be reached.
        """
        if self._is_here:
            return {}
        try:
            files = huggingface_hub.get_cached_repo_tree(self.name, revision=self.root.name)
        except CachedRepoTreeNotFoundError:  # downloaded by an older client, and now offline
            return {}
        return {file.path: file.size for file in files}

    @property
    def is_listed(self) -> bool:
        """True if all files are known, rather than only those in the local cache."""
        return self._is_here or bool(self.listing)

    def places(self, component: str) -> list[str]:
        """List the files that a component needs: configuration and weights, or all of its files."""
        names = self._names(component)
        if self._has_weights(component):
            names = [CONFIG, *self._weights(component)[0]]
        return [f"{component}/{name}" for name in names]

    def absent_bytes(self, component: str) -> list[int]:
        """List the bytes of each file that a component needs and that is still to be downloaded.

        Empty for a folder, which need not hold any weights.
        """
        places = self.places(component) if self.listing else []
        return [self.listing[place] for place in places if not (self.root / place).is_file()]

    def fetch(self, places: Iterable[str]) -> Path:
        """Download the files that are not here yet, and return the model's folder."""
        if not self.listing:  # a folder, or the hub cannot be reached
            return self.root
        with self.reading():
            # by commit rather than branch, so that all files of a model are of one version
            return self._download(self.root.name, places)

    def read_config(self, place: str) -> dict[str, Any]:
        """Read a configuration file, such as ``unet/config.json``."""
        with self.reading():
            path = self.fetch([place]) / place
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"its {place} must be a JSON object ({error})") from error
            if not isinstance(config, dict):
                kind = type(config).__name__
                raise ValueError(f"its {place} must be a JSON object (got a {kind})")
            return config

    def safetensors(self, component: str) -> list[Path]:
        """Return the safetensors files of a component, downloaded or converted if necessary.

        If plain files are read in place of the requested variant, a line says so, once.
        """
        names, form = self._weights(component)
        folder = self.fetch(self.places(component)) / component
        if form.is_plain:
            _print_once(
                f"{component} of {self.name}: no {self.variant} variant,"
                f" {'the plain file is' if len(names) == 1 else 'plain files are'} read"
            )
        with self.reading():
            return [as_safetensors(folder / name, self.name) for name in names]

    @contextmanager
    def plain_folder(self, components: Collection[str]) -> Iterator[Path]:
        """Yield a folder of links to the model, for loaders that know no fallbacks or old names.

        It holds the model's index and these components, their weights as plain safetensors files.
        """
        with TemporaryDirectory(prefix="model-") as temporary:
            folder = Path(temporary)
            (folder / INDEX).symlink_to((self.root / INDEX).resolve())
            for component in components:
                place = folder / component
                here = (self.fetch(self.places(component)) / component).absolute()
                if not self._has_weights(component):
                    place.symlink_to(here)
                    continue
                place.mkdir()
                (place / CONFIG).symlink_to(here / CONFIG)
                _link_weights(self.safetensors(component), place)
            yield folder

    @property
    def _is_here(self) -> bool:
        return Path(self.name).is_dir()

    def _download(self, revision: str | None, places: Iterable[str]) -> Path:
        download = huggingface_hub.snapshot_download
        return Path(download(self.name, revision=revision, allow_patterns=list(places)))

    def _has_weights(self, component: str) -> bool:
        names = set(self._names(component))
        weights = any(map(WEIGHTS.fullmatch, names))
        return weights or (CONFIG in names and not names & OTHER_CONFIGS)

    def _weights(self, component: str) -> tuple[list[str], Form]:
        with self.reading():
            return choose_weights(component, self._names(component), self.variant)

    def _names(self, component: str) -> list[str]:
        if not self.listing:
            files = (self.root / component).glob("*")
            return [path.name for path in files if path.is_file()]  # reading a pipe would hang
        start = f"{component}/"
        return [place.removeprefix(start) for place in self.listing if place.startswith(start)]


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
        if not converted.is_file():
            tensors = _read_pickled(path, model)
            write_tensors(converted, tensors, tensors.__getitem__)
            _print_once(
                f"{path.parent.name} of {model}: {path.name} is converted to {converted}, once"
            )
    return converted


def _read_pickled(path: Path, model: str) -> "dict[str, Tensor]":
    """Read the tensors of a file that PyTorch has pickled, without running any code in it."""
    import torch

    from adapters.base.tensor_files import DTYPE_NAMES

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
    return {str(name): tensor.detach() for name, tensor in found.items()}


def _link_weights(files: Sequence[Path], folder: Path) -> None:
    """Link safetensors files as one plain file, or as shards and their index."""
    match = WEIGHTS.fullmatch(files[0].name)
    assert match is not None
    # transformers names its pickled files differently from its safetensors files
    stem = "model" if match["stem"] == "pytorch_model" else match["stem"]
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
def _print_once(line: str) -> None:
    """Print a line on standard error, once; of several processes, only the first prints."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)
