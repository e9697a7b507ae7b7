"""How pictures are sampled from the cascade."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Sampling(BaseModel):
    """Steps, guidance and noise level by stage; the defaults are the published pipelines' own."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    stage_1_steps: Annotated[int, Field(ge=1)] = 100
    """Denoising steps of Stage I."""
    stage_1_guidance: Annotated[float, Field(ge=1)] = 7.0
    """Classifier-free guidance of Stage I; 1: none."""
    stage_2_steps: Annotated[int, Field(ge=1)] = 50
    """Denoising steps of Stage II."""
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

    def arguments(self, stage: int) -> dict[str, Any]:
        """The settings of a stage by the names that its diffusers pipeline gives them."""
        levels = {2: self.noise_level, 3: self.stage_3_noise_level}
        steps = {1: self.stage_1_steps, 2: self.stage_2_steps, 3: self.stage_3_steps}
        guidance = {1: self.stage_1_guidance, 2: self.stage_2_guidance, 3: self.stage_3_guidance}
        arguments = {"num_inference_steps": steps[stage], "guidance_scale": guidance[stage]}
        return arguments | ({"noise_level": levels[stage]} if stage in levels else {})
