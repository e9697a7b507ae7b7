"""The values of a base's configuration files, checked before a library builds anything by them.

The libraries check few of them: a group norm of no groups, pictures of no size or a million layers
fail, or go on without end, somewhere inside.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.mistakes import describe_first

CONFIG = "config.json"
"""The configuration of a component with weights."""

SCHEDULER_CONFIG = "scheduler_config.json"
"""The configuration of a noise schedule."""

Width = Annotated[int, Field(ge=1, le=65_536)]
Layers = Annotated[int, Field(ge=1, le=256)]
Probability = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0, le=1e6)]

Each: TypeAlias = Annotated[list[Width], Field(min_length=1, max_length=32)]
"""The widths of all blocks."""


class Configuration(BaseModel):
    """Some of the keys of a configuration file; others are for the library that reads it."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class UNetConfiguration(Configuration):
    """The configuration of a UNet."""

    sample_size: Annotated[int, Field(ge=1, le=8192)] | None = None
    in_channels: Width = 4
    out_channels: Width = 4
    block_out_channels: Each
    layers_per_block: Layers | Annotated[list[Layers], Field(max_length=32)] = 2
    transformer_layers_per_block: Layers | Annotated[list[Layers], Field(max_length=32)] = 1
    norm_num_groups: Width = 32
    norm_eps: Factor = 1e-5
    attention_head_dim: Width | Each | None = 8
    cross_attention_dim: Width | Each = 1280
    encoder_hid_dim: Width | None = None
    addition_embed_type_num_heads: Width = 64
    time_embedding_dim: Width | None = None
    num_class_embeds: Annotated[int, Field(ge=1, le=10**6)] | None = None
    conv_in_kernel: Annotated[int, Field(ge=1, le=31)] = 3
    conv_out_kernel: Annotated[int, Field(ge=1, le=31)] = 3
    dropout: Probability = 0.0
    mid_block_scale_factor: Factor = 1.0
    resnet_out_scale_factor: Factor = 1.0

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        smallest = 2 ** (len(self.block_out_channels) - 1)
        if self.sample_size is not None and self.sample_size % smallest:
            raise ValueError(
                f"sample_size must be a multiple of {smallest}, as its blocks halve the picture"
                f" {len(self.block_out_channels) - 1} times (got {self.sample_size})"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups must divide all of block_out_channels, such as {channels}"
                    f" (got {self.norm_num_groups})"
                )
        return self


class SchedulerConfiguration(Configuration):
    """The configuration of a noise schedule."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=10**6)]
    beta_schedule: str
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.0001
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    steps_offset: Annotated[int, Field(ge=0, le=10**6)] = 0
    clip_sample: bool = True
    clip_sample_range: Factor = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: Annotated[float, Field(gt=0, le=1)] = 0.995
    sample_max_value: Factor = 1.0
    trained_betas: list[Annotated[float, Field(gt=0, lt=1)]] | None = None
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    variance_type: Literal[
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned",
        "learned_range",
    ] = "fixed_small"


class VisionConfiguration(Configuration):
    """The sizes of a safety checker's eye."""

    hidden_size: Width = 768
    intermediate_size: Annotated[int, Field(ge=1, le=10**6)] = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Annotated[int, Field(ge=1, le=1024)] = 12
    image_size: Annotated[int, Field(ge=1, le=8192)] = 224
    patch_size: Annotated[int, Field(ge=1, le=8192)] = 32


class CheckerConfiguration(Configuration):
    """The configuration of a safety checker."""

    vision_config: VisionConfiguration


class T5Configuration(Configuration):
    """The configuration of a T5 encoder, which a base's text encoder is."""

    model_type: Literal["t5"]
    vocab_size: Annotated[int, Field(ge=1, le=10**7)]
    d_model: Width
    d_kv: Width
    d_ff: Annotated[int, Field(ge=1, le=10**6)]
    num_layers: Layers
    num_heads: Annotated[int, Field(ge=1, le=1024)]
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=4096)] = 32
    relative_attention_max_distance: Annotated[int, Field(ge=4, le=10**6)] = 128
    dropout_rate: Probability = 0.1
    layer_norm_epsilon: Factor = 1e-6


def check_configuration(place: str, config: Mapping[str, Any]) -> None:
    """Check the values of a configuration file that are known to matter.

    Args:
        place: its path in the model, such as ``unet/config.json``.
        config: its keys and values.

    Raises:
        ValueError: with the first mistake.
    """
    kind = _find_kind(place, config)
    if kind is None:
        return
    try:
        kind.model_validate(dict(config))
    except ValidationError as error:
        field, words = describe_first(error)
        said = f"{field} in its {place} {words}" if field else f"in its {place}, {words}"
        raise ValueError(said) from None


def _find_kind(place: str, config: Mapping[str, Any]) -> type[Configuration] | None:
    """Return the kind of a configuration; ``None``: none that is checked."""
    folder, _, name = place.rpartition("/")
    if name == SCHEDULER_CONFIG:
        return SchedulerConfiguration
    if folder == "unet" or config.get("_class_name") == "UNet2DConditionModel":
        return UNetConfiguration
    if folder == "text_encoder" and config.get("model_type") != "clip_text_model":
        return T5Configuration
    return CheckerConfiguration if folder == "safety_checker" and name == CONFIG else None
