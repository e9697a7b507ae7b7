"""Sampling settings by stage: steps, guidance, noise level."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

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
from adapters.mistakes import WHOLE, describe_expected, describe_found

TIMESTEPS = MappingProxyType(
    {
        "fast27": 27,
        "smart27": 27,
        "smart50": 50,
        "smart100": 100,
        "smart185": 185,
        "super27": 27,
        "super40": 40,
        "super100": 100,
    }
)
"""Upstream's respaced timesteps by name, and the number of steps of each."""

RENAMED = MappingProxyType(
    {
        **{
            f"stage_{stage}_{setting}": (f"stage_{stage}", setting)
            for stage in (1, 2, 3)
            for setting in ("timesteps", "steps", "guidance", "noise_level")
        },
        "noise_level": ("stage_2", "noise_level"),
    }
)
"""The stage and name of each setting that was flat until version 0.1, and still is in commands."""

HABITS = MappingProxyType(
    {
        "num_inference_steps": "steps",
        "guidance_scale": "guidance",
        "cfg": "guidance",
        "cfg_scale": "guidance",
    }
)
"""The names of a stage's settings, by those of diffusers and other tools."""

MOST_STEPS = 10_000
"""The most denoising steps; schedulers have 1,000 training timesteps."""

LARGEST_GUIDANCE = 1000.0
"""The largest scale of guidance, far beyond all that draws a picture."""


class SettingError(UserError, ValueError):
    """A setting that is unknown or out of range, in one sentence."""

    def __init__(self, error: ValidationError) -> None:
        first = error.errors(include_url=False)[0]
        self.place = tuple(map(str, first["loc"]))
        """The path of the setting: its stage, if any, then its name."""
        message = describe_expected(first)
        if first["type"] == "extra_forbidden":
            of_stage = len(self.place) > 1 or error.title == StageSampling.__name__
            names = list((StageSampling if of_stage else Sampling).model_fields)
            meant = HABITS.get(self.place[-1])
            close = f"it is {meant} here" if meant else closest(self.place[-1], names)
            message = f"unknown setting; {close}"
        if message.startswith("unknown name") and "valid:" not in message:
            message += f" (valid: {', '.join(TIMESTEPS)})"
        found = "" if first["type"] in WHOLE else f" {describe_found(first['input'])}"
        self.reason = f"{message}{found}{'' if message.endswith('?') and not found else '.'}"
        """The sentence without the place."""
        super().__init__(": ".join(filter(None, (".".join(self.place), self.reason))))


class Settings(BaseModel):
    """Settings that raise a :class:`SettingError` if one is unknown or out of range."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    if not TYPE_CHECKING:  # type checkers take the fields as arguments

        def __init__(self, **given: Any) -> None:
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise SettingError(error) from None

        # lets a recipe validate without it, and so show all mistakes with their places
        __init__.__pydantic_base_init__ = True


class StageSampling(Settings):
    """Settings of one stage; ``None``: the default of the pipeline that draws."""

    timesteps: Annotated[str, name_in(TIMESTEPS)] | None = None
    """Upstream's respaced timesteps by name, such as ``smart50`` (Stage I and II); ``None``: evenly
    spaced ones."""
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    """Denoising steps; leave this out if timesteps are named, as they determine it."""
    guidance: Annotated[float, Field(ge=1, le=LARGEST_GUIDANCE, allow_inf_nan=False)] | None = None
    """The scale of classifier-free guidance; 1: none."""
    noise_level: Annotated[int, Field(ge=0, lt=MOST_STEPS)] | None = None
    """The augmentation level of the picture that is enlarged (Stage II and III); lower keeps more
    of it."""

    @field_validator("steps")
    @classmethod
    def _check_count(cls, steps: int | None, info: ValidationInfo) -> int | None:
        name = info.data.get("timesteps")
        if name is not None and steps not in (None, TIMESTEPS[name]):
            raise ValueError(f"{name} has {TIMESTEPS[name]} steps: leave this out (got {steps})")
        return steps

    def over(self, defaults: "StageSampling") -> "StageSampling":
        """Complete these settings with those of ``defaults``."""
        own = self.model_dump(exclude_none=True)
        if self.timesteps is not None:
            own["steps"] = TIMESTEPS[self.timesteps]
        elif self.steps is not None:
            own["timesteps"] = None
        return defaults.model_copy(update=own)


DEFAULTS = MappingProxyType(
    {
        1: StageSampling(steps=100, guidance=7.0),
        2: StageSampling(steps=50, guidance=4.0, noise_level=250),
        3: StageSampling(steps=75, guidance=9.0, noise_level=20),
    }
)
"""The published pipelines' own settings, by stage."""


class Sampling(Settings):
    """Settings of every stage; those left out are the published pipelines' own.

    Raises:
        SettingError: a :class:`UserError` and ValueError, if one is unknown or out of range.

    Example:
        >>> Sampling(stage_1=StageSampling(timesteps="smart50"), batch_size=4).stage_1.steps
        50
    """

    stage_1: StageSampling = DEFAULTS[1]
    """Stage I: timesteps, steps, guidance."""
    stage_2: StageSampling = DEFAULTS[2]
    """Stage II: timesteps, steps, guidance, noise level."""
    stage_3: StageSampling = DEFAULTS[3]
    """The x4 upscaler: steps, guidance, noise level."""
    batch_size: Annotated[int, Field(ge=1, le=10_000)] = 8
    """The number of pictures sampled at a time; they do not depend on it, beyond rounding."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        for name in given if isinstance(given, dict) else ():
            if name in RENAMED:
                stage, setting = RENAMED[name]
                raise ValueError(f"{name} is now {stage}: {{{setting}: …}} ({stage}.{setting})")
            if (own := HABITS.get(name, name)) in StageSampling.model_fields:
                raise ValueError(
                    f"{name} is a setting of each stage: stage_1=StageSampling({own}=…), or in a"
                    f" recipe stage_1: {{{own}: …}}"
                )
        return given

    @field_validator("stage_1", "stage_2", "stage_3")
    @classmethod
    def _complete(cls, given: StageSampling, info: ValidationInfo) -> StageSampling:
        stage = int(str(info.field_name)[-1])
        foreign = {1: ("noise_level", given.noise_level), 3: ("timesteps", given.timesteps)}
        setting, value = foreign.get(stage, ("", None))
        if value is not None:
            raise ValueError(f"Stage {stage} takes no {setting}: leave it out (got {value!r})")
        return given.over(DEFAULTS[stage])

    def but(self, **changes: Any) -> "Sampling":
        """Copy these settings with some changed; a stage's other settings are kept.

        A stage's steps and timesteps replace one another.

        Raises:
            SettingError: if one is unknown or out of range.

        Example:
            >>> Sampling().but(stage_2=StageSampling(steps=10)).stage_2
            StageSampling(timesteps=None, steps=10, guidance=4.0, noise_level=250)
        """
        settings = self.model_dump()
        for name, value in changes.items():
            if name.startswith("stage_") and name in settings:
                own = value if isinstance(value, dict) else value.model_dump(exclude_none=True)
                dropped = {"steps", "timesteps"} if own.keys() & {"steps", "timesteps"} else set()
                kept = {key: old for key, old in settings[name].items() if key not in dropped}
                value = kept | own
            settings[name] = value
        return Sampling(**settings)

    def of(self, stage: int) -> StageSampling:
        """Look up the settings of a stage."""
        return {1: self.stage_1, 2: self.stage_2, 3: self.stage_3}[stage]

    def steps(self, stage: int) -> int:
        """Look up the number of denoising steps of a stage."""
        steps = self.of(stage).steps
        assert steps is not None, "completed on construction"
        return steps

    def timesteps(self, stage: int) -> Sequence[int] | None:
        """Look up a stage's named timesteps, descending; ``None``: evenly spaced ones."""
        name = self.of(stage).timesteps
        if name is None:
            return None
        from diffusers.pipelines.deepfloyd_if import timesteps as upstream

        named: Sequence[int] = vars(upstream)[f"{name}_timesteps"]
        return named

    def arguments(self, stage: int) -> dict[str, Any]:
        """Make a stage's arguments, under the names of its diffusers pipeline."""
        arguments = {
            "num_inference_steps": self.steps(stage),
            "guidance_scale": self.of(stage).guidance,
            "noise_level": self.of(stage).noise_level,
            "timesteps": self.timesteps(stage),
        }
        return {name: value for name, value in arguments.items() if value is not None}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nest settings with flat names of :data:`RENAMED` by stage; others stay as they are."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        if name in RENAMED:
            stage, setting = RENAMED[name]
            nested.setdefault(stage, {})[setting] = value
        else:
            nested[name] = value
    return nested
