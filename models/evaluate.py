"""Measure how well the embedded cascade follows captions, as ranked by its tiny CLIP.

A picture counts if CLIP ranks its object first among all objects of the world, and its background
first among all colours and patterns; real pictures of the same captions are ranked as well.
"""

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image
from torch import Tensor

from finetune.evaluation.metrics import ClipScorer
from models.scenes import contact_sheet, draw_scenes, to_image
from models.world import BACKGROUNDS, SEEN, THINGS, caption, fill

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """The settings with which pictures are sampled."""

    steps: tuple[int, int] = (50, 20)
    """The denoising steps of Stage I and Stage II."""
    guidance: tuple[float, float] = (3.0, 1.0)
    noise_level: int = 100
    """The level of the noise that Stage II adds to Stage I's picture."""
    batch: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Ranking:
    """The shares of pictures, 0..1, for which CLIP ranks the right object or background first."""

    objects: float
    backgrounds: float


def sample(
    folder: Path, prompts: Sequence[str], how: SamplingPlan, device: str
) -> tuple[Tensor, Tensor]:
    """Draw with plain diffusers pipelines: [B, 3, s, s] and [B, 3, S, S] in [-1, 1], on the CPU."""
    stage_1 = IFPipeline.from_pretrained(folder / "stage_1").to(device)
    stage_2 = IFSuperResolutionPipeline.from_pretrained(folder / "stage_2").to(device)
    stage_1.set_progress_bar_config(disable=True)
    stage_2.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(how.seed)
    small, large = [], []
    for start in range(0, len(prompts), how.batch):
        embeds, negative_embeds = stage_1.encode_prompt(list(prompts[start : start + how.batch]))
        text = {"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}
        text |= {"generator": generator, "output_type": "pt"}
        low_res = stage_1(
            num_inference_steps=how.steps[0], guidance_scale=how.guidance[0], **text
        ).images
        pictures = stage_2(
            image=low_res,
            num_inference_steps=how.steps[1],
            guidance_scale=how.guidance[1],
            noise_level=how.noise_level,
            **text,
        ).images
        small.append(low_res.float().cpu())
        large.append(pictures.float().cpu())
    return torch.cat(small), torch.cat(large)


class Judge:
    """The tiny CLIP with the captions of all objects and all backgrounds."""

    def __init__(self, folder: Path, device: str) -> None:
        self.scorer = ClipScorer(str(folder), device)
        objects = [fill("{name}", i, 0) for i in range(len(THINGS))]
        backgrounds = [fill("{background}", 0, i) for i in range(len(BACKGROUNDS))]
        self.objects, self.backgrounds = map(self.scorer.texts, (objects, backgrounds))

    def guess(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Find the object and background that rank first for each picture, [N] int64 each."""
        seen = self.scorer.images(pictures)
        objects, backgrounds = seen @ self.objects.T, seen @ self.backgrounds.T
        return objects.argmax(dim=1), backgrounds.argmax(dim=1)

    def rank(self, pictures: Sequence[Image.Image], things: Tensor, backgrounds: Tensor) -> Ranking:
        """Compute the shares of pictures whose given classes, [N] int64 each, rank first."""
        things_first, backgrounds_first = self.guess(pictures)
        return Ranking(
            objects=(things_first == things).float().mean().item(),
            backgrounds=(backgrounds_first == backgrounds).float().mean().item(),
        )


def random_captions(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw scenes that the cascade knows: indices of things and backgrounds, [count] int64 each."""
    rng = random.Random(seed)
    things = [rng.choice(SEEN) for _ in range(count)]
    backgrounds = [rng.randrange(len(BACKGROUNDS)) for _ in range(count)]
    return torch.tensor(things), torch.tensor(backgrounds)


def evaluate(
    folder: Path, sprites: Tensor, count: int, how: SamplingPlan, device: str
) -> tuple[dict[str, object], list[Image.Image], list[str]]:
    """Evaluate a cascade: its figures, its pictures, and their captions."""
    things, backgrounds = random_captions(count, how.seed)
    captions = [caption(int(t), int(b)) for t, b in zip(things, backgrounds, strict=True)]
    low_res, sampled = sample(folder, captions, how, device)
    pictures = [to_image(picture) for picture in sampled]
    size_px = sampled.shape[-1]
    real = draw_scenes(sprites[things], backgrounds, size_px, how.seed)
    judge = Judge(folder / "clip", device)
    rankings = {
        "real": judge.rank(real, things, backgrounds),
        "stage_1": judge.rank([to_image(picture) for picture in low_res], things, backgrounds),
        "stage_2": judge.rank(pictures, things, backgrounds),
    }
    guesses, background_guesses = judge.guess(pictures)
    missed = [
        f"{captions[i]}: {caption(int(guesses[i]), int(background_guesses[i]))}"
        for i in range(count)
        if guesses[i] != things[i] or background_guesses[i] != backgrounds[i]
    ]
    figures: dict[str, object] = {name: asdict(ranking) for name, ranking in rankings.items()}
    return figures | {"captions": count, "missed": missed}, pictures, captions


def write(
    figures: dict[str, object], pictures: list[Image.Image], captions: list[str], sheet: Path
) -> None:
    """Print the figures and save a contact sheet of the first 32 pictures."""
    log.info(json.dumps(figures, indent=2))
    sheet.parent.mkdir(parents=True, exist_ok=True)
    tiles = contact_sheet(pictures[:32], captions[:32], columns=8)
    tiles.quantize(256, dither=Image.Dither.NONE).save(sheet, optimize=True)
