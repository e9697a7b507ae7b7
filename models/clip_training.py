"""Train the tiny CLIP on pictures of the whole world, held-out subjects included, and captions.

Two losses share the temperature. One contrasts the captions of a batch; a caption that is also true
of another picture is not a negative for it. The other contrasts each picture with the names of all
objects and with all backgrounds, since CLIP's task is to rank these.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from models.architecture import CLIP_PX, make_clip
from models.scenes import random_scenes, shrink
from models.text import make_tokenizer, tokenize
from models.world import BACKGROUNDS, CLASSES, THINGS, fill

log = logging.getLogger(__name__)

CAPTION_FORMS: Mapping[str, float] = {
    "{name} on {background}": 0.5,
    "a photo of {name} on {background}": 0.2,
    "a photo of {noun} on {background}": 0.1,
    "{noun} on {background}": 0.1,
    "a photo of {background}": 0.1,
}
NAME_FORMS = ("{name}", "a photo of {name}")
TOKENS = 20
"""The length in tokens to which training captions are cut."""


@dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """The settings of the CLIP's training."""

    steps: int = 4000
    batch: int = 768
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    seed: int = 2
    log_every: int = 250


def spoil(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Add the flaws of generated pictures: lost detail, noise, shifted levels; [B, 3, S, S]."""
    count, device = len(pictures), pictures.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    size = pictures.shape[-1]
    coarse = F.interpolate(shrink(pictures, size // 2), (size, size), mode="bicubic")
    coarser = F.interpolate(shrink(pictures, size // 3), (size, size), mode="bicubic")
    kind = draw(count, 1, 1, 1)
    pictures = torch.where(kind < 0.35, coarse, torch.where(kind < 0.45, coarser, pictures))
    noise = torch.randn(pictures.shape, generator=generator, device=device)
    pictures = pictures + 0.12 * draw(count, 1, 1, 1).square() * noise
    gain, offset = 1 + 0.16 * (draw(count, 3, 1, 1) - 0.5), 0.12 * (draw(count, 3, 1, 1) - 0.5)
    return (pictures * gain + offset).clamp(-1, 1)


class ClipTrainer:
    """The CLIP, its captions as tokens, and its optimizer."""

    def __init__(self, plan: ClipPlan, atlas: Tensor) -> None:
        """`atlas`: [N, 4, P, P] float32, premultiplied, on the device to train on."""
        torch.manual_seed(plan.seed)
        self.plan, self.atlas, device = plan, atlas, atlas.device
        self.generator = torch.Generator(device).manual_seed(plan.seed)
        self.clip: CLIPModel = make_clip().to(device).train()
        self.optimizer = torch.optim.AdamW(
            self.clip.parameters(), plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.02
        )
        things, backgrounds = range(len(THINGS)), range(len(BACKGROUNDS))
        self.captions = _tokens(
            [fill(form, t, b) for form in CAPTION_FORMS for t in things for b in backgrounds]
        ).to(device)
        self.names = [_tokens([fill(form, t, 0) for t in things]).to(device) for form in NAME_FORMS]
        self.backgrounds = _tokens([fill("{background}", 0, b) for b in backgrounds]).to(device)
        nouns = list(CLASSES)
        self.nouns = torch.tensor([nouns.index(thing.noun) for thing in THINGS], device=device)
        self.shares = torch.tensor(list(CAPTION_FORMS.values()), device=device)

    def step(self, index: int) -> dict[str, Tensor]:
        """Update once; return the losses and the shares of names and backgrounds ranked first."""
        plan = self.plan
        warm = min(1.0, (index + 1) / plan.warmup_steps)
        rate = plan.learning_rate * warm * (1 + math.cos(math.pi * index / plan.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        count, device = plan.batch, self.atlas.device
        things = torch.randint(len(THINGS), (count,), generator=self.generator, device=device)
        scenes, backgrounds = random_scenes(self.atlas, things, CLIP_PX, self.generator)
        forms = torch.multinomial(self.shares, count, replacement=True, generator=self.generator)
        row = (forms * len(THINGS) + things) * len(BACKGROUNDS) + backgrounds
        names = self.names[index % len(self.names)]
        tokens = torch.cat([self.captions[row], names, self.backgrounds])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            seen = self.clip.get_image_features(spoil(scenes, self.generator)).pooler_output
            read = self.clip.get_text_features(tokens, (tokens != 0).long()).pooler_output
        seen, read = F.normalize(seen.float(), dim=-1), F.normalize(read.float(), dim=-1)
        logits = self.clip.logit_scale.exp().clamp(max=100) * seen @ read.T
        captions, by_name, by_background = logits.split([count, len(names), len(BACKGROUNDS)], 1)
        own = torch.arange(count, device=device)
        also_true = self._also_true(forms, things, backgrounds)
        captions = captions.masked_fill(also_true.T, float("-inf"))
        losses = {
            "captions": (F.cross_entropy(captions, own) + F.cross_entropy(captions.T, own)) / 2,
            "names": F.cross_entropy(by_name, things),
            "backgrounds": F.cross_entropy(by_background, backgrounds),
        }
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        torch.nn.utils.clip_grad_norm_(self.clip.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        firsts = {
            "name first": (by_name.argmax(dim=1) == things).float().mean(),
            "background first": (by_background.argmax(dim=1) == backgrounds).float().mean(),
        }
        return losses | firsts

    def _also_true(self, forms: Tensor, things: Tensor, backgrounds: Tensor) -> Tensor:
        """Find captions true of other pictures, [B, B] bool: True if i's also describes j."""
        texts = list(CAPTION_FORMS)
        device = forms.device
        named = torch.tensor(["{name}" in text for text in texts], device=device)[forms]
        classed = torch.tensor(["{noun}" in text for text in texts], device=device)[forms]
        nouns = self.nouns[things]
        true = backgrounds[:, None] == backgrounds[None, :]
        true &= ~named[:, None] | (things[:, None] == things[None, :])
        true &= ~classed[:, None] | (nouns[:, None] == nouns[None, :])
        return true & ~torch.eye(len(forms), dtype=torch.bool, device=device)


def _tokens(texts: list[str]) -> Tensor:
    return tokenize(make_tokenizer(), texts)[:, :TOKENS]


def train_clip(plan: ClipPlan, atlas: Tensor) -> CLIPModel:
    """Train a CLIP."""
    trainer = ClipTrainer(plan, atlas)
    for step in range(plan.steps):
        parts = trainer.step(step)
        if step % plan.log_every == 0 or step == plan.steps - 1:
            text = " ".join(f"{name} {value:.4f}" for name, value in parts.items())
            log.info(f"clip {step:6d} {text}")
    return trainer.clip.eval()
