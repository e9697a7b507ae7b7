"""The files of a model's components: choosing, downloading and converting them.

Weights of the requested variant are read, or else the plain files; of either, the safetensors
files, or else the pickled ``.bin`` files, which are converted once.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import huggingface_hub  # imports its parts only when they are used
from huggingface_hub.errors import CachedRepoTreeNotFoundError, StrictDataclassError
from safetensors import SafetensorError

from adapters.base.configurations import CONFIG, SCHEDULER_CONFIG, check_configuration
from adapters.base.conversion import as_safetensors
from adapters.base.hub import asking_the_hub, is_hub_name
from adapters.base.weight_files import WEIGHTS, Form, choose_weights, link_weights
from adapters.errors import UserError, listed, print_once
from adapters.text_files import parse_object, read_text

INDEX = "model_index.json"
"""The file that names a model's components."""

OTHER_CONFIGS = {"tokenizer_config.json", SCHEDULER_CONFIG, "preprocessor_config.json"}
"""The configurations of components without weights."""

NETWORKS = {
    *("UNet2DConditionModel", "AutoencoderKL", "T5EncoderModel", "CLIPTextModel"),
    *("IFSafetyChecker", "IFWatermarker"),
}
"""The classes of components with weights."""

NEEDED: Mapping[str, Sequence[Collection[str]]] = MappingProxyType(
    {
        **dict.fromkeys(("T5Tokenizer", "T5TokenizerFast"), ({"tokenizer.json"}, {"spiece.model"})),
        **dict.fromkeys(
            ("CLIPTokenizer", "CLIPTokenizerFast"),
            ({"tokenizer.json"}, {"vocab.json", "merges.txt"}),
        ),
        "CLIPImageProcessor": ({"preprocessor_config.json"},),
    }
)
"""The sets of files of which a component needs one, by its class: without them, transformers makes
a tokenizer of no words."""

LOADING_ERRORS = (
    *(OSError, ValueError, LookupError, ArithmeticError, RuntimeError, TypeError, AttributeError),
    *(SafetensorError, StrictDataclassError),
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
        except Exception as error:
            # torch's error for a full GPU is a RuntimeError; tokenizers raises Exception itself
            is_memory = type(error).__name__ == "OutOfMemoryError"
            if is_memory or not (isinstance(error, LOADING_ERRORS) or type(error) is Exception):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            advice = (
                "correct its files, or fetch them again"
                if self._is_here
                else "check its name, revision and variant, and on the hub accept its licence and"
                " log in (hf auth login)"
            )
            raise UserError(
                f"The model {self.name!r} cannot be loaded; {advice}: {reason}"
            ) from error

    @cached_property
    def root(self) -> Path:
        """The model's folder; for a hub model, that of its commit in the cache, with the index."""
        if self._is_here:
            if self.revision:
                print_once(
                    f"The revision {self.revision!r} has no effect on {self.name}: it is a folder,"
                    " and only names on the hub have revisions"
                )
            return Path(self.name)
        if Path(self.name).exists():
            raise UserError(
                f"The model {self.name!r} must be a folder, but is a file; name the folder with the"
                f" {INDEX} in it."
            )
        if not is_hub_name(self.name):
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

    def check_part(self, component: str) -> None:
        """Raise a UserError if a component is missing, or files that it needs are."""
        kind, names = self.parts.get(component), set(self._names(component))
        with self.reading():
            if kind is None:
                raise ValueError(f"its {INDEX} names no {component}")
            if kind.endswith("Scheduler"):
                self.read_config(f"{component}/{SCHEDULER_CONFIG}")
            elif alternatives := NEEDED.get(kind):
                if not any(names.issuperset(needed) for needed in alternatives):
                    wanted = " or ".join(listed(sorted(needed)) for needed in alternatives)
                    raise FileNotFoundError(f"its {component} has no {wanted}")
            elif kind in NETWORKS:
                self.read_config(f"{component}/{CONFIG}")
                self._weights(component)

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
            try:
                text = read_text(self.fetch([place]) / place)
            except ValueError as error:
                raise ValueError(f"its {place} cannot be read ({error})") from error
            try:
                config = parse_object(text)
            except ValueError as error:
                raise ValueError(f"its {place} must be a JSON object ({error})") from error
            check_configuration(place, config)
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
