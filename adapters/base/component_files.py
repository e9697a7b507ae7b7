"""The files of a model's components: choosing, downloading and converting them.

Weights of the requested variant are read, or else the plain files; of either, the safetensors
files, or else the pickled ``.bin`` files, which are converted once.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub  # imports its parts only when they are used
from huggingface_hub.errors import CachedRepoTreeNotFoundError, StrictDataclassError
from safetensors import SafetensorError

from adapters.base.conversion import as_safetensors
from adapters.base.hub import asking_the_hub
from adapters.base.weight_files import WEIGHTS, Form, choose_weights, link_weights
from adapters.errors import UserError, print_once

INDEX = "model_index.json"
"""The file that names a model's components."""

CONFIG = "config.json"
"""The configuration of a component with weights."""

OTHER_CONFIGS = {"tokenizer_config.json", "scheduler_config.json", "preprocessor_config.json"}
"""The configurations of components without weights."""

LOADING_ERRORS = (
    *(OSError, ValueError, SafetensorError),
    *(TypeError, AttributeError, KeyError, NotImplementedError, StrictDataclassError),
)
"""Errors that diffusers and transformers raise if files are missing or hold something else."""


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
            print_once(
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
                link_weights(self.safetensors(component), place)
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
