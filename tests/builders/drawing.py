"""Image-to-image and inpainting: what diffusers' own pipelines draw, with all a cascade adds."""

import numpy as np
from PIL import Image

from adapters import Cascade, CascadeImages, Sampling, StageSampling


def picture(seed: int = 0, width: int = 40, height: int = 40) -> Image.Image:
    """Random pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def right_half(width: int = 40, height: int = 40) -> Image.Image:
    """A mask that is white on the right."""
    mask = Image.new("L", (width, height), "black")
    mask.paste("white", (width // 2, 0, width, height))
    return mask


FEW_STEPS = Sampling(
    stage_1=StageSampling(steps=3, guidance=3.0),
    stage_2=StageSampling(steps=2, guidance=2.0, noise_level=100),
    stage_3=StageSampling(steps=2, guidance=5.0),
)

PROMPT = "A <b>Photo</b> of a sks cat "


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def largest_difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(pixels(a) - pixels(b)).max())


def draw(cascade: Cascade, seed: int = 5) -> CascadeImages:
    return cascade(PROMPT, seed=seed, sampling=FEW_STEPS, progress=False)
