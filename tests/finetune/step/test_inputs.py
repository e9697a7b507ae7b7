"""The UNets' inputs in training are, bit for bit, those of the published pipelines."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    IFImg2ImgPipeline,
    IFImg2ImgSuperResolutionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
)

from finetune.step.inputs import Batch, add_noise, unet_inputs
from finetune.step.stages import STAGES
from tests.builders.random_cascade import RandomCascade

COUNT, TEXT = 2, (77, 32)


class ShownError(Exception):
    """Carries what a pipeline showed its UNet, out of the pipeline."""


def shown_by(pipeline: Any, **call: Any) -> dict[str, Any]:
    """The keyword arguments of the pipeline's first UNet call, without guidance."""

    def record(sample: Any, timestep: Any, **arguments: Any) -> None:
        raise ShownError({"sample": sample, "timestep": timestep, **arguments})

    pipeline.unet.forward = record
    with pytest.raises(ShownError) as shown:
        pipeline(guidance_scale=1.0, num_inference_steps=10, output_type="pt", **call)
    inputs: dict[str, Any] = shown.value.args[0]
    return inputs


def schedulers_of(pipeline: Any, stage: int) -> tuple[DDPMScheduler, ...]:
    return tuple(getattr(pipeline, name) for name in STAGES[stage].schedulers)


def random_batch(size: int, low_res: int | None, timestep: int, noise_level: int) -> Batch:
    """A batch whose noise is drawn in the pipelines' order from seed 0."""
    pictures = torch.Generator().manual_seed(1)
    draw = torch.Generator().manual_seed(0)
    shape = (COUNT, 3, size, size)
    batch = Batch(
        pixels=torch.rand(shape, generator=pictures) * 2 - 1,
        prompt_embeds=torch.randn((COUNT, *TEXT), generator=pictures),
        weight=torch.full((COUNT,), 1 / COUNT),
        noise=torch.randn(shape, generator=draw),
        timesteps=torch.full((COUNT,), timestep),
    )
    if low_res is None:
        return batch
    return replace(
        batch,
        low_res=torch.rand((COUNT, 3, low_res, low_res), generator=pictures) * 2 - 1,
        low_res_noise=torch.randn(shape, generator=draw),
        noise_level=torch.full((COUNT,), noise_level),
    )


def assert_same(ours: dict[str, Any], shown: dict[str, Any]) -> None:
    assert torch.equal(ours["sample"], shown["sample"])
    assert torch.equal(ours["encoder_hidden_states"], shown["encoder_hidden_states"])
    assert torch.equal(ours["timestep"], shown["timestep"].expand(COUNT))
    assert ("class_labels" in ours) == ("class_labels" in shown)
    if "class_labels" in ours:
        assert torch.equal(ours["class_labels"], shown["class_labels"])


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_stage_1_is_shown_what_img2img_shows(
    random_cascade: RandomCascade, strength: float
) -> None:
    published = IFPipeline.from_pretrained(random_cascade.stage_1)
    pipeline = IFImg2ImgPipeline(**published.components, requires_safety_checker=False)
    pipeline.scheduler.set_timesteps(10)
    timestep = int(pipeline.get_timesteps(10, strength)[0][0])
    batch = random_batch(published.unet.config.sample_size, None, timestep, 0)
    shown = shown_by(
        pipeline,
        image=batch.pixels,
        prompt_embeds=batch.prompt_embeds,
        strength=strength,
        generator=torch.Generator().manual_seed(0),
    )
    schedulers = schedulers_of(published, 1)
    ours = unet_inputs(STAGES[1], batch, add_noise(batch, schedulers[0]), schedulers, torch.float32)
    assert_same(ours, shown)


@pytest.mark.parametrize(("strength", "noise_level"), [(0.3, 0), (0.7, 250), (1.0, 999)])
def test_stage_2_is_shown_what_img2img_shows(
    random_cascade: RandomCascade, strength: float, noise_level: int
) -> None:
    published = IFSuperResolutionPipeline.from_pretrained(random_cascade.stage_2)
    pipeline = IFImg2ImgSuperResolutionPipeline(
        **published.components, requires_safety_checker=False
    )
    pipeline.scheduler.set_timesteps(10)
    timestep = int(pipeline.get_timesteps(10, strength)[0][0])
    batch = random_batch(published.unet.config.sample_size, 16, timestep, noise_level)
    shown = shown_by(
        pipeline,
        image=batch.low_res,
        original_image=batch.pixels,
        prompt_embeds=batch.prompt_embeds,
        strength=strength,
        noise_level=noise_level,
        generator=torch.Generator().manual_seed(0),
    )
    schedulers = schedulers_of(published, 2)
    ours = unet_inputs(STAGES[2], batch, add_noise(batch, schedulers[0]), schedulers, torch.float32)
    assert_same(ours, shown)


def test_stage_2_low_res_half_is_that_of_plain_sampling(random_cascade: RandomCascade) -> None:
    """From pure noise, the plain super-resolution pipeline shows the same low-res half."""
    pipeline = IFSuperResolutionPipeline.from_pretrained(random_cascade.stage_2)
    batch = random_batch(pipeline.unet.config.sample_size, 16, 900, 250)
    schedulers = schedulers_of(pipeline, 2)
    shown = shown_by(
        pipeline,
        image=batch.low_res,
        prompt_embeds=batch.prompt_embeds,
        noise_level=250,
        generator=torch.Generator().manual_seed(0),
    )
    ours = unet_inputs(STAGES[2], batch, batch.noise, schedulers, torch.float32)
    assert_same(ours, shown)


def test_only_what_the_unet_sees_is_cast(random_cascade: RandomCascade) -> None:
    published = IFPipeline.from_pretrained(random_cascade.stage_1)
    batch = random_batch(published.unet.config.sample_size, None, 500, 0)
    noisy = add_noise(batch, published.scheduler)
    inputs = unet_inputs(STAGES[1], batch, noisy, (published.scheduler,), torch.bfloat16)
    assert inputs["sample"].dtype == inputs["encoder_hidden_states"].dtype == torch.bfloat16
    assert inputs["timestep"].dtype == torch.int64
    assert torch.equal(inputs["sample"], noisy.bfloat16())
