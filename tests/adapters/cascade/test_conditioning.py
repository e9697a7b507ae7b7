"""What each picture is drawn from reaches each stage: its own prompt, negative and seed."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
)
from diffusers.utils.pil_utils import numpy_to_pil
from PIL import Image

from adapters import Cascade, load_cascade
from adapters.cascade.sampling import Sampling, StageSampling
from tests.builders.random_cascade import RandomCascade

PROMPTS = ["a cat", "a dog", "a cat on blue"]
NEGATIVES = ["a dog on blue", "a sks cat", "a photo"]
SAMPLING = Sampling(
    stage_1=StageSampling(steps=2, guidance=3.0),
    stage_2=StageSampling(steps=2, guidance=2.0, noise_level=100),
    stage_3=StageSampling(steps=2, guidance=5.0, noise_level=50),
    batch_size=2,
)
STAGE_1 = {"num_inference_steps": 2, "guidance_scale": 3.0}
STAGE_2 = {"num_inference_steps": 2, "guidance_scale": 2.0, "noise_level": 100}
STAGE_3 = {"num_inference_steps": 2, "guidance_scale": 5.0, "noise_level": 50}
SEED = 5


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(pixels(a) - pixels(b)).max())


@pytest.fixture(scope="module")
def cascade(random_cascade: RandomCascade) -> Cascade:
    return load_cascade(*vars(random_cascade).values(), device="cpu")


@pytest.fixture(scope="module")
def plain(random_cascade: RandomCascade) -> dict[int, DiffusionPipeline]:
    kinds = (IFPipeline, IFSuperResolutionPipeline, StableDiffusionUpscalePipeline)
    places = vars(random_cascade).values()
    pipelines = [kind.from_pretrained(place) for kind, place in zip(kinds, places, strict=True)]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    return dict(enumerate(pipelines, start=1))


def drawn_alone(
    plain: dict[int, DiffusionPipeline], row: int, negative: str | None, **changes: Any
) -> list[Image.Image]:
    """A picture of each stage by diffusers' pipelines alone."""
    text = {"prompt": PROMPTS[row], "negative_prompt": negative} | changes

    def draw(number: int, settings: dict[str, Any], **below: Any) -> Any:
        generator = torch.Generator().manual_seed(SEED + row)
        return plain[number](**text, **settings, **below, generator=generator).images

    first = draw(1, STAGE_1, output_type="pt")
    second = draw(2, STAGE_2, image=first, output_type="pt")
    finished = [numpy_to_pil(unit(drawn).permute(0, 2, 3, 1).numpy()) for drawn in (first, second)]
    text.pop("clean_caption", None)  # Stage III cleans nothing
    return [image for (image,) in (*finished, draw(3, STAGE_3, image=unit(second)))]


def unit(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] as [0, 1]."""
    return (pixels / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("negative", [None, NEGATIVES[0]])
def test_a_negative_prompt_reaches_every_stage(
    cascade: Cascade, plain: dict[int, DiffusionPipeline], negative: str | None
) -> None:
    options = {"seed": SEED, "sampling": SAMPLING, "progress": False}
    images = cascade(PROMPTS, negative_prompt=negative, **options)
    other = cascade(PROMPTS[:1], negative_prompt=NEGATIVES[1], **options)
    for row in range(len(PROMPTS)):
        expected = drawn_alone(plain, row, negative)
        for ours, theirs in zip(images[row].pictures.values(), expected, strict=True):
            assert difference(ours, theirs) <= 1
    for ours, theirs in zip(images[0].pictures.values(), other[0].pictures.values(), strict=True):
        assert difference(ours, theirs) > 1


def test_each_picture_is_led_away_from_its_own_negative(
    cascade: Cascade, plain: dict[int, DiffusionPipeline]
) -> None:
    """Whatever the batches."""
    images = cascade(
        PROMPTS, negative_prompt=NEGATIVES, seed=SEED, sampling=SAMPLING, progress=False
    )
    for row, negative in enumerate(NEGATIVES):
        expected = drawn_alone(plain, row, negative)
        for ours, theirs in zip(images[row].pictures.values(), expected, strict=True):
            assert difference(ours, theirs) <= 1
    assert difference(images.stage_1[2], drawn_alone(plain, 2, NEGATIVES[0])[0]) > 1


def test_prompts_are_cleaned_unless_asked_otherwise(
    cascade: Cascade, plain: dict[int, DiffusionPipeline]
) -> None:
    options = {"seed": SEED, "sampling": SAMPLING, "progress": False}
    told = {"prompt": "A <b>CAT</b>", "negative_prompt": "a <i>dog</i>"}
    for clean in (True, False):
        ours = cascade(**told, clean_caption=clean, **options)
        theirs = drawn_alone(plain, 0, None, **told, clean_caption=clean)
        for stage, expected in ((ours.stage_1, theirs[0]), (ours.stage_2, theirs[1])):
            assert difference(stage[0], expected) <= 1


def test_no_more_pictures_are_drawn_at_once_than_asked_for(cascade: Cascade) -> None:
    rows: dict[int, list[int]] = {1: [], 2: [], 3: []}
    hooks = [
        unet.register_forward_pre_hook(
            lambda _, inputs, given, number=number: rows[number].append(
                len(inputs[0] if inputs else given["sample"])
            ),
            with_kwargs=True,
        )
        for number, unet in (
            *((number, pipe.unet.conv_in) for number, pipe in cascade.stages.items()),
            (3, cascade.upscaler.unet.conv_in),
        )
    ]
    cascade(PROMPTS, seed=SEED, sampling=SAMPLING, progress=False)
    for hook in hooks:
        hook.remove()
    guided = 2  # each is drawn with and without its prompt
    for seen in rows.values():
        assert seen == [2 * guided] * 2 + [1 * guided] * 2
