"""Loading the stages of a cascade from folders or hub names, with diffusers' own pipelines."""

import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    SchedulerMixin,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPConfig, T5Config, T5EncoderModel, T5Tokenizer

from adapters.base.component_files import ModelFiles
from adapters.base.guards import CHECKER, GUARDS, SafetyChecker
from adapters.base.hub import split_revision
from adapters.errors import UserError
from unets.frozen import freeze
from unets.loading import fill, load_unet, placement

PIPELINES: dict[int, type[DiffusionPipeline]] = {
    1: IFPipeline,
    2: IFSuperResolutionPipeline,
    3: StableDiffusionUpscalePipeline,
}
"""The pipeline of each stage."""

LOADING_ERRORS = (
    *(OSError, ValueError, SafetensorError),
    *(TypeError, AttributeError, KeyError, NotImplementedError, StrictDataclassError),
)
"""What diffusers and transformers raise where files are missing, or hold something else."""

FIELD_TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
}
"""What a field of a scheduler may hold, by the type of its default."""

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Source:
    """Where a stage's files are: a folder, or a hub name with a revision and a variant.

    A revision in the name (``owner/name@v2``) goes before ``revision``, and is no part of ``name``
    afterwards.
    """

    name: str
    stage: int
    revision: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        name, own = split_revision(self.name)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "revision", own or self.revision)

    def pipeline(self, dtype: torch.dtype, **components: Any) -> DiffusionPipeline:
        """The stage's pipeline with all of its guards; ``components`` replace others.

        This and all below raise a UserError where there is no such model, or one of another stage.
        """

        def load(_: Path) -> DiffusionPipeline:
            options = {"dtype": dtype, "use_safetensors": True}
            parts = [part for part in self.parts if part not in components]
            with self.files.plain_folder(parts) as folder:
                if CHECKER in parts and self.has_safety_checker:
                    place = folder / CHECKER
                    components[CHECKER] = SafetyChecker.from_pretrained(place, **options)
                return PIPELINES[self.stage].from_pretrained(folder, **components, **options)

        self._check_schedulers()
        return self.load(load)

    @property
    def has_safety_checker(self) -> bool:
        """Whether its pictures are guarded by IF's own."""
        return self._class_of(CHECKER) == IFSafetyChecker.__name__

    def guard_weights(self, dtype: torch.dtype) -> list[Tensor]:
        """The weights of its safety checker without values; none where it has no such."""
        if not self.has_safety_checker:
            return []
        config = self.load(CLIPConfig.from_pretrained, CHECKER)
        with torch.device("meta"):
            return list(SafetyChecker(config).to(dtype).state_dict().values())

    def unet(self, precision: str, device: torch.device) -> UNet2DConditionModel:
        """The stage's UNet, frozen, in a precision of :func:`unets.loading.empty_unet`."""
        config, files = self.unet_config, self.weights("unet")
        return self.load(lambda _: load_unet(config, files, precision, device))

    def text_encoder(
        self, precision: str, dtype: torch.dtype, device: torch.device
    ) -> T5EncoderModel:
        """The stage's text encoder, frozen; ``dtype`` is that of what is not quantised."""
        self._check_text_encoder()

        def load(folder: Path) -> T5EncoderModel:
            config = T5Config.from_pretrained(folder, subfolder="text_encoder")
            encoder = _empty_text_encoder(config, dtype)
            place = placement(encoder, precision, dtype, device)
            fill(encoder, files, place, optional=T5EncoderModel._tied_weights_keys)
            encoder.tie_weights()
            return encoder

        files = self.weights("text_encoder")
        return self.load(load)

    def tokenizer(self) -> T5Tokenizer:
        """The tokenizer of the stage's text encoder, without the encoder."""
        self._check_text_encoder()

        def load(_: Path) -> T5Tokenizer:
            folder = self.files.fetch(["tokenizer/*"])
            return T5Tokenizer.from_pretrained(folder, subfolder="tokenizer")

        return self.load(load)

    def text_pipeline(self, precision: str, dtype: torch.dtype, device: torch.device) -> IFPipeline:
        """The stage's pipeline with its tokenizer and text encoder alone, see above.

        It draws no pictures, so the components that guard pictures are not loaded either.
        """
        encoder = self.text_encoder(precision, dtype, device)
        no_pictures = dict.fromkeys(("unet", *GUARDS)) | {"requires_safety_checker": False}
        return self.pipeline(dtype, text_encoder=encoder, **no_pictures)

    def blank_text_encoder(self, precision: str, dtype: torch.dtype) -> T5EncoderModel:
        """What :meth:`text_encoder` gives, without values and on the meta device."""
        config = self.load(T5Config.from_pretrained, "text_encoder")
        encoder = _empty_text_encoder(config, dtype)
        place = placement(encoder, precision, dtype, torch.device("meta"))
        for name, weight in encoder.state_dict().items():
            place(name, weight)
        encoder.tie_weights()
        return encoder

    @cached_property
    def files(self) -> ModelFiles:
        """The model's files."""
        return ModelFiles(self.name, self.revision, self.variant)

    def weights(self, part: str) -> list[Path]:
        """The safetensors files of a component, see :meth:`ModelFiles.safetensors`."""
        return self.load(lambda _: self.files.safetensors(part))

    def absent_bytes(self, part: str) -> list[int]:
        """The sizes of a component's files that are still to be downloaded, in bytes."""
        return self.load(lambda _: self.files.absent_bytes(part))

    @property
    def folder(self) -> Path:
        """The model's folder with all of its components; of the hub's, what its pipeline loads."""
        return self.load(
            lambda _: self.files.fetch(
                place for part in self.parts for place in self.files.places(part)
            )
        )

    @property
    def parts(self) -> list[str]:
        """The names of the model's components."""
        # a name is a folder's too, and must not lead out of the model
        return [name for name in self.index if name.isidentifier() and self._class_of(name)]

    @property
    def unet_config(self) -> dict[str, Any]:
        """The configuration of the stage's UNet."""
        return self.load(_object, "unet", kind=UNet2DConditionModel)

    def scheduler(self, name: str) -> DDPMScheduler:
        """The noise schedule of a component: ``scheduler``, or ``image_noising_scheduler``."""
        return self.load(DDPMScheduler.from_pretrained, name)

    @property
    def picture_size_px(self) -> int:
        """The side of the stage's pictures, from its UNet's configuration."""
        return int(self.unet_config["sample_size"])

    @cached_property
    def index(self) -> dict[str, Any]:
        """The model's index, its components by name, once it is of the stage's class."""
        wanted, found = PIPELINES[self.stage].__name__, self.class_name
        if found != wanted:
            raise UserError(
                f"Stage {self.stage} needs a model of class {wanted}, but {self.name} is a"
                f" {found}; give each stage its own model."
            )
        return self._any_index

    @property
    def class_name(self) -> str | None:
        """The name of the model's pipeline class, which tells its stage."""
        return self._any_index.get("_class_name")

    @cached_property
    def _any_index(self) -> dict[str, Any]:
        if not Path(self.name).is_dir() and self.name.count("/") != 1:
            raise UserError(
                f"The model {self.name!r} is neither a folder that exists nor a hub name"
                " (owner/name, owner/name@revision); correct the path."
            )
        return self._read(_object, kind=DiffusionPipeline)

    def _class_of(self, component: str) -> str | None:
        """The name of a component's class; ``None``: the model has no such component."""
        named = self.index.get(component)
        return named[-1] if isinstance(named, list) and named else None

    def _check_text_encoder(self) -> None:
        """Check that the stage has a text encoder."""
        if self._class_of("text_encoder") is None:
            raise UserError(
                f"{self.name} has no text encoder of its own; name Stage I, or a model that has"
                " one."
            )

    def _check_schedulers(self) -> None:
        """Check that the fields of the stage's schedulers are of the types that they must be."""
        for part in self.index:
            kind = getattr(diffusers, str(self._class_of(part)), None)
            if inspect.isclass(kind) and issubclass(kind, SchedulerMixin):
                self._read(_check_fields, part, kind=kind)

    def load(self, load: Callable[..., Loaded], part: str | None = None, **options: Any) -> Loaded:
        """What ``load(folder, …)`` gives, once the model is of the stage's class.

        Args:
            load: is given the model's folder and the options.
            part: a component whose configuration ``load`` reads, as its option ``subfolder``.
            options: handed on.
        """
        _ = self.index  # checks the model's class before anything else of it is read
        return self._read(load, part, **options)

    def _read(self, load: Callable[..., Loaded], part: str | None = None, **options: Any) -> Loaded:
        try:
            folder = self.files.root
            if part is not None:
                folder = self.files.fetch([f"{part}/*config.json"])
                options["subfolder"] = part
            return load(folder, **options)
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"The model {self.name!r} cannot be loaded; check its name, revision and variant,"
                f" and on the hub accept its licence and log in (hf auth login): {reason}"
            ) from error


def _object(folder: Path, kind: type[ConfigMixin], **options: Any) -> dict[str, Any]:
    """The configuration of a kind of component, or a ValueError where it is no JSON object."""
    config = kind.load_config(folder, **options)
    if not isinstance(config, dict):
        file = "/".join(filter(None, (options.get("subfolder"), kind.config_name)))
        raise ValueError(f"its {file} must be a JSON object (got a {type(config).__name__})")
    return dict(config)


def _check_fields(folder: Path, kind: type[ConfigMixin], **options: Any) -> None:
    """A ValueError where a field of a component is not of the type of its default."""
    config = _object(folder, kind, **options)
    for field, parameter in inspect.signature(kind.__init__).parameters.items():
        wanted, words = FIELD_TYPES.get(type(parameter.default), (object, ""))
        value = config.get(field, parameter.default)
        if not isinstance(value, wanted):
            file = f"{options['subfolder']}/{kind.config_name}"
            raise ValueError(f"{field} in its {file} must be {words} (got {value!r})")


def _empty_text_encoder(config: T5Config, dtype: torch.dtype) -> T5EncoderModel:
    """A frozen text encoder on the meta device."""
    with torch.device("meta"):
        encoder = T5EncoderModel(config).to(dtype).eval()
    freeze(encoder)
    return encoder


def source_of(name: str, revision: str | None = None, variant: str | None = None) -> Source:
    """Stage I or II of a name, whichever its class says it is.

    Raises:
        UserError: where there is no such model, or one of another class.
    """
    candidates = [Source(name, stage, revision, variant) for stage in (1, 2)]
    for source in candidates:
        if source.class_name == PIPELINES[source.stage].__name__:
            return source
    wanted = " or ".join(PIPELINES[source.stage].__name__ for source in candidates)
    raise UserError(
        f"A base is a model of class {wanted}, but {name} is a {candidates[0].class_name}; name"
        " Stage I or II."
    )


def sources_of(
    names: Sequence[str], revision: str | None = None, variant: str | None = None
) -> dict[int, Source]:
    """The models of several names by stage; a folder with ``stage_1`` ... in it is several.

    Raises:
        UserError: as :func:`source_of`, and where two models are of one stage.
    """
    places = [place for name in names for place in _stages_in(name)]
    sources: dict[int, Source] = {}
    for source in (source_of(place, revision, variant) for place in places):
        if source.stage in sources:
            raise UserError(
                f"{sources[source.stage].name} and {source.name} are both of Stage {source.stage};"
                " name one model for each stage."
            )
        sources[source.stage] = source
    return sources


def _stages_in(name: str) -> list[str]:
    stages = [Path(name) / folder for folder in ("stage_1", "stage_2")]
    return [str(folder) for folder in stages if folder.is_dir()] or [name]
