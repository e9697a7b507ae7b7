"""Loading the stages of a cascade from folders or hub names, with diffusers' own pipelines.

Recipes name sources, so heavy libraries are imported only in the functions that use them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.arguments import expand_name
from adapters.base.component_files import ModelFiles
from adapters.base.configurations import CONFIG
from adapters.base.hub import STAGE_FOLDERS, split_revision
from adapters.errors import UserError
from unets.precision import dtype_of

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler, DiffusionPipeline, IFPipeline, UNet2DConditionModel
    from transformers import T5EncoderModel, T5Tokenizer

PIPELINES = {1: "IFPipeline", 2: "IFSuperResolutionPipeline", 3: "StableDiffusionUpscalePipeline"}
"""The name of each stage's pipeline in diffusers."""

PARTS = {
    1: ("unet", "scheduler"),
    2: ("unet", "scheduler", "image_noising_scheduler"),
    3: ("unet", "scheduler", "vae", "low_res_scheduler", "text_encoder", "tokenizer"),
}
"""The components that each stage needs, apart from those of Stage I and II that read texts."""

TEXT_PARTS = ("text_encoder", "tokenizer")
"""The components that read texts; those of Stage I do so for the whole cascade."""

CHANNELS = {1: 3, 2: 6}
"""The channels that each stage's UNet reads: a noisy picture, and the one that is enlarged."""

CHECKER = "safety_checker"
"""The component that stays in main memory and visits the device of the pictures that it checks."""

GUARDS = (CHECKER, "feature_extractor", "watermarker")
"""The components that guard a stage's pictures; always kept as the base has them."""


@dataclass(frozen=True)
class Source:
    """The place of a stage's files: a folder, or a hub name with a revision and a variant.

    A revision in the name (``owner/name@v2``) takes precedence over ``revision``, and is removed
    from ``name``. All properties and methods raise a UserError if there is no such model, or it is
    of another stage.
    """

    name: str
    stage: int
    revision: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        name, own = split_revision(expand_name(self.name))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "revision", own or self.revision)

    @cached_property
    def files(self) -> ModelFiles:
        """The model's files, once the model is found to be of the stage's class."""
        if self.class_name != PIPELINES[self.stage]:
            raise UserError(
                f"Stage {self.stage} needs a model of class {PIPELINES[self.stage]}, but"
                f" {self.name} is a {self.class_name}; give each stage its own model."
            )
        return self._any_files

    @property
    def class_name(self) -> str | None:
        """The name of the model's pipeline class, which tells its stage."""
        return self._any_files.index.get("_class_name")

    @cached_property
    def _any_files(self) -> ModelFiles:
        return ModelFiles(self.name, self.revision, self.variant)

    @property
    def folder(self) -> Path:
        """The model's folder with all components; of a hub model, those that its pipeline loads."""
        places = [place for part in self.files.parts for place in self.files.places(part)]
        return self.files.fetch(places)

    @property
    def unet_config(self) -> dict[str, Any]:
        """The configuration of the stage's UNet."""
        place = f"unet/{CONFIG}"
        config = self.files.read_config(place)
        if self.stage in CHANNELS:
            channels = CHANNELS[self.stage]
            with self.files.reading():
                for field, wanted in (("in_channels", channels), ("out_channels", 6)):
                    if config.get(field) != wanted:
                        raise ValueError(
                            f"{field} in its {place} must be {wanted} in Stage {self.stage} (got"
                            f" {config.get(field)})"
                        )
                for field in ("sample_size", "encoder_hid_dim"):
                    if config.get(field) is None:
                        raise ValueError(f"{field} in its {place} must be given (got null)")
        return config

    @property
    def picture_size_px(self) -> int:
        """The side of the stage's pictures, from its UNet's configuration."""
        return int(self.unet_config["sample_size"])

    @property
    def has_safety_checker(self) -> bool:
        """True if IF's own safety checker guards its pictures."""
        return self.files.parts.get(CHECKER) == "IFSafetyChecker"

    def pipeline(self, dtype: "torch.dtype", **components: Any) -> "DiffusionPipeline":
        """Load the stage's pipeline with all of its guards; ``components`` replace its own."""
        import diffusers

        from adapters.base.guards import SafetyChecker

        options = {"dtype": dtype, "use_safetensors": True}
        parts = [part for part in self.files.parts if part not in components]
        with self.files.reading():
            for part in dict.fromkeys((*PARTS[self.stage], *parts)):
                if part not in components:
                    self.files.check_part(part)
            with self.files.plain_folder(parts) as folder:
                if CHECKER in parts and self.has_safety_checker:
                    place = folder / CHECKER
                    components[CHECKER] = SafetyChecker.from_pretrained(place, **options)
                kind = getattr(diffusers, PIPELINES[self.stage])
                pipeline = kind.from_pretrained(folder, **components, **options)
            for part in parts:
                self._check_finite(part, getattr(pipeline, part))
            return pipeline

    def unet(self, precision: str, device: "torch.device") -> "UNet2DConditionModel":
        """Load the stage's UNet, frozen, in a precision of :func:`unets.loading.empty_unet`."""
        from unets.loading import load_unet

        with self.files.reading():
            return load_unet(self.unet_config, self.files.safetensors("unet"), precision, device)

    def text_encoder(self, precision: str, device: "torch.device") -> "T5EncoderModel":
        """Load the stage's text encoder, frozen; on the meta device without values."""
        import torch
        from transformers import T5Config, T5EncoderModel

        from unets.frozen import freeze
        from unets.loading import fill, placement

        self._check_text_encoder()
        with self.files.reading():
            config = T5Config.from_dict(self.files.read_config(f"text_encoder/{CONFIG}"))
            with torch.device("meta"):
                encoder = T5EncoderModel(config).to(dtype_of(precision)).eval()
            freeze(encoder)
            place = placement(encoder, precision, encoder.dtype, device)
            if device.type == "meta":
                for name, weight in encoder.state_dict().items():
                    place(name, weight)
            else:
                files = self.files.safetensors("text_encoder")
                fill(encoder, files, place, optional=T5EncoderModel._tied_weights_keys)
            encoder.tie_weights()
            return encoder

    def tokenizer(self) -> "T5Tokenizer":
        """Load the tokenizer of the stage's text encoder, without the encoder."""
        from transformers import T5Tokenizer

        self.check_text_parts()
        with self.files.reading():
            folder = self.files.fetch(["tokenizer/*"]) / "tokenizer"
            tokenizer = T5Tokenizer.from_pretrained(folder)
            encoder = self.files.read_config(f"text_encoder/{CONFIG}")
            own, known = len(tokenizer), int(encoder["vocab_size"])
            if not known / 2 < own <= known:  # T5's encoder has a few more rows than words
                raise ValueError(
                    f"its tokenizer has {own:,} words, and its text_encoder {known:,}, so they are"
                    " not of one model"
                )
            return tokenizer

    def text_pipeline(self, precision: str, device: "torch.device") -> "IFPipeline":
        """Load the stage's pipeline with its tokenizer and text encoder alone.

        It draws no pictures, so the components that guard pictures are not loaded either.
        """
        components = {
            "tokenizer": self.tokenizer(),
            "text_encoder": self.text_encoder(precision, device),
        }
        no_pictures = dict.fromkeys(("unet", *GUARDS)) | {"requires_safety_checker": False}
        return self.pipeline(dtype_of(precision), **components, **no_pictures)

    def scheduler(self, name: str) -> "DDPMScheduler":
        """Load the noise schedule of ``scheduler`` or ``image_noising_scheduler``."""
        from diffusers import DDPMScheduler

        with self.files.reading():
            config = self.files.read_config(f"{name}/{DDPMScheduler.config_name}")
            return DDPMScheduler.from_config(config)

    def _check_finite(self, part: str, component: object) -> None:
        """Raise a ValueError that names the file if a component has values that are not finite."""
        from torch import nn

        from unets.loading import is_finite

        weights = component.named_parameters() if isinstance(component, nn.Module) else ()
        for name, weight in weights:
            if not weight.is_meta and not is_finite(weight):
                files = ", ".join(map(str, self.files.safetensors(part)))
                raise ValueError(
                    f"{files}: {name} has values that are NaN or infinite, so the file is damaged"
                )

    def check_parts(self) -> None:
        """Check, without reading weights, that all is there that the stage needs to draw.

        Raises:
            UserError: if a component is missing, or files that it needs are.
        """
        for part in PARTS[self.stage]:
            self.files.check_part(part)
        _ = self.unet_config

    def check_text_parts(self) -> None:
        """Check, as :meth:`check_parts`, that all is there that reads texts."""
        self._check_text_encoder()
        for part in TEXT_PARTS:
            self.files.check_part(part)

    def _check_text_encoder(self) -> None:
        if "text_encoder" not in self.files.parts:
            raise UserError(
                f"{self.name} has no text encoder of its own; name Stage I, or a model that has"
                " one."
            )


def source_of(name: str, revision: str | None = None, variant: str | None = None) -> Source:
    """Return the source of Stage I or II, whichever the model's class is for.

    Raises:
        UserError: if there is no such model, or it is of another class.
    """
    source = Source(name, 1, revision, variant)
    for stage in (1, 2):
        if source.class_name == PIPELINES[stage]:
            return replace(source, stage=stage)
    raise UserError(
        f"A base is a model of class {PIPELINES[1]} or {PIPELINES[2]}, but {name} is a"
        f" {source.class_name}; name Stage I or II."
    )


def sources_of(
    names: Sequence[str], revision: str | None = None, variant: str | None = None
) -> dict[int, Source]:
    """Return named models by stage; a folder with ``stage_1`` ... in it stands for several.

    Raises:
        UserError: as :func:`source_of`, and if two models are of one stage.
    """
    sources: dict[int, Source] = {}
    for name in map(expand_name, names):
        folders = [Path(name) / folder for folder in STAGE_FOLDERS]
        for place in [str(folder) for folder in folders if folder.is_dir()] or [name]:
            source = source_of(place, revision, variant)
            if source.stage in sources:
                raise UserError(
                    f"{sources[source.stage].name} and {source.name} are both of Stage"
                    f" {source.stage}; name one model for each stage."
                )
            sources[source.stage] = source
    return sources
