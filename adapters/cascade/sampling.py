"""How pictures are sampled from the cascade."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from diffusers.pipelines.deepfloyd_if import (
    fast27_timesteps,
    smart27_timesteps,
    smart50_timesteps,
    smart100_timesteps,
    smart185_timesteps,
    super27_timesteps,
    super40_timesteps,
    super100_timesteps,
)
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from adapters.errors import UserError, closest, name_in

TIMESTEPS: Mapping[str, Sequence[int]] = MappingProxyType(
    {
        "fast27": fast27_timesteps,
        "smart27": smart27_timesteps,
        "smart50": smart50_timesteps,
        "smart100": smart100_timesteps,
        "smart185": smart185_timesteps,
        "super27": super27_timesteps,
        "super40": super40_timesteps,
        "super100": super100_timesteps,
    }
)
"""Upstream's respaced timesteps, descending; the number in a name says how many they are."""

TIMESTEPS_OF = {"stage_1_steps": "stage_1_timesteps", "stage_2_steps": "stage_2_timesteps"}
"""The two fields that say how many steps a stage takes."""

WHOLE = ("value_error", "extra_forbidden")
"""The mistakes whose message says all."""

Timesteps = Annotated[str, name_in(TIMESTEPS)]


class SettingError(UserError, ValueError):
    """A setting that is unknown or out of range, in one sentence."""

    def __init__(self, error: ValidationError) -> None:
        first = error.errors(include_url=False)[0]
        self.field = str(first["loc"][0])
        """The setting's name."""
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = f"unknown setting; {closest(self.field, list(Sampling.model_fields))}"
        if said.startswith("unknown name") and "valid:" not in said:
            said += f" (valid: {', '.join(TIMESTEPS)})"
        found = "" if first["type"] in WHOLE else f" (got {first['input']!r})"
        self.said = f"{said}{found}{'' if said.endswith('?') and not found else '.'}"
        """What is wrong with it."""
        super().__init__(f"{self.field}: {self.said}")


class Sampling(BaseModel):
    """Steps, guidance and noise level by stage; the defaults are the published pipelines' own.

    Raises:
        SettingError: a :class:`UserError` and ValueError, where one is unknown or out of range.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    stage_1_timesteps: Timesteps | None = None
    """Respaced timesteps of Stage I by name, such as ``smart50``, one for each of its steps;
    ``None``: evenly spaced ones."""
    stage_1_steps: Annotated[int, Field(ge=1)] = 100
    """Denoising steps of Stage I; left out where its timesteps are named, which decide on it."""
    stage_1_guidance: Annotated[float, Field(ge=1)] = 7.0
    """Classifier-free guidance of Stage I; 1: none."""
    stage_2_timesteps: Timesteps | None = None
    """Respaced timesteps of Stage II by name, such as ``super40``."""
    stage_2_steps: Annotated[int, Field(ge=1)] = 50
    """Denoising steps of Stage II; left out where its timesteps are named."""
    stage_2_guidance: Annotated[float, Field(ge=1)] = 4.0
    """Classifier-free guidance of Stage II; 1: none."""
    noise_level: Annotated[int, Field(ge=0)] = 250
    """The augmentation level of the low-res picture in Stage II; lower keeps more of it."""
    stage_3_steps: Annotated[int, Field(ge=1)] = 75
    """Denoising steps of the x4 upscaler."""
    stage_3_guidance: Annotated[float, Field(ge=1)] = 9.0
    """Classifier-free guidance of the x4 upscaler."""
    stage_3_noise_level: Annotated[int, Field(ge=0)] = 20
    """The x4 upscaler's noise level."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """How many pictures are sampled at a time; they do not depend on it, beyond rounding."""

    if not TYPE_CHECKING:  # its fields are its arguments

        def __init__(self, **given: Any) -> None:
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise SettingError(error) from None

        # validation in a recipe goes on without it, with all mistakes and their places
        __init__.__pydantic_base_init__ = True

    @model_validator(mode="before")
    @classmethod
    def _count_timesteps(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        names = {steps: given.get(timesteps) for steps, timesteps in TIMESTEPS_OF.items()}
        known = {field: name for field, name in names.items() if name in list(TIMESTEPS)}
        return {field: len(TIMESTEPS[name]) for field, name in known.items()} | given

    @field_validator("stage_1_steps", "stage_2_steps")
    @classmethod
    def _is_their_count(cls, steps: int, info: ValidationInfo) -> int:
        name = info.data.get(TIMESTEPS_OF[str(info.field_name)])
        count = steps if name is None else len(TIMESTEPS[name])
        if steps != count:
            raise ValueError(f"{name} has {count} steps: leave this out (got {steps})")
        return steps

    def but(self, **changes: Any) -> "Sampling":
        """These settings with some others, checked; steps and timesteps replace one another.

        Raises:
            SettingError: where one is unknown or out of range.
        """
        kept = self.model_dump()
        for steps, timesteps in TIMESTEPS_OF.items():
            if changes.keys() & {steps, timesteps}:
                del kept[steps], kept[timesteps]
        return Sampling(**kept | changes)

    def timesteps(self, stage: int) -> Sequence[int] | None:
        """The named timesteps of a stage, descending; ``None``: evenly spaced ones."""
        name = {1: self.stage_1_timesteps, 2: self.stage_2_timesteps}.get(stage)
        return None if name is None else TIMESTEPS[name]

    def steps(self, stage: int) -> int:
        """How many denoising steps a stage takes."""
        return {1: self.stage_1_steps, 2: self.stage_2_steps, 3: self.stage_3_steps}[stage]

    def arguments(self, stage: int) -> dict[str, Any]:
        """The settings of a stage by the names that its diffusers pipeline gives them."""
        guidance = {1: self.stage_1_guidance, 2: self.stage_2_guidance, 3: self.stage_3_guidance}
        levels = {2: self.noise_level, 3: self.stage_3_noise_level}
        arguments = {
            "num_inference_steps": self.steps(stage),
            "guidance_scale": guidance[stage],
            "noise_level": levels.get(stage),
            "timesteps": self.timesteps(stage),
        }
        return {name: value for name, value in arguments.items() if value is not None}
