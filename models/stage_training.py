"""Train the stages of the embedded cascade from scratch, with the toolkit's own losses.

The text encoder learns along with Stage I in the first part of Stage I's training and is then
frozen, as IF's is from the start; Stage II uses the frozen one.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import Parameter
from transformers import T5EncoderModel

from finetune.step.inputs import Batch, add_noise, unet_inputs
from finetune.step.losses import Losses, NoiseTables, hybrid_loss
from finetune.step.stages import STAGES
from models.architecture import (
    make_noising_scheduler,
    make_scheduler,
    make_text_encoder,
    make_unet,
    save_stage,
)
from models.scenes import random_scenes, shrink
from models.text import caption_table, make_tokenizer
from models.world import FORMS, SEEN

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a stage's training."""

    stage: int
    scene_px: int
    """The size at which scenes are drawn, before they are shrunk to the stage's."""
    steps: int
    batch: int
    learning_rate: float = 1e-3
    """The rate after warm-up, from which it falls to zero along a cosine."""
    warmup_steps: int = 100
    text_share: float = 0.0
    """The share of the steps in which the text encoder learns too."""
    weight_cap: float = 1.0
    """The limit of a picture's weight, 1 / alphas_cumprod: colours are decided at high noise, where
    the error in epsilon is small but the error in the picture is not."""
    noise_offset: float = 0.0
    """The standard deviation of a constant added to each noise channel. At 128 px the noise
    averages out, so x_t reveals the picture's mean colour, although sampling starts from pure
    noise; with an offset, only the low-res picture reveals it."""
    ema_decay: float = 0.999
    seed: int = 0
    log_every: int = 200

    @property
    def name(self) -> str:
        """The stage's folder."""
        return STAGES[self.stage].name


ROUNDS: Mapping[str, tuple[Plan, ...]] = {
    "stage_1": (Plan(stage=1, scene_px=64, steps=4020, batch=512, text_share=0.35),),
    "stage_2": (
        Plan(stage=2, scene_px=128, steps=2482, batch=128, seed=1),
        Plan(
            stage=2,
            scene_px=128,
            steps=4817,
            batch=64,
            learning_rate=2e-3,
            weight_cap=15.0,
            seed=4,
        ),
        Plan(
            stage=2,
            scene_px=128,
            steps=704,
            batch=64,
            warmup_steps=40,
            weight_cap=5.0,
            noise_offset=0.25,
            seed=5,
        ),
    ),
}
"""The rounds of each stage's training; each continues from the one before."""


class SceneSampler:
    """Random batches of a stage's world, drawn on the device."""

    def __init__(self, plan: Plan, atlas: Tensor, size_px: int, low_res_px: int | None) -> None:
        """`atlas`: [N, 4, P, P] float32, premultiplied, on the device to draw on."""
        self.plan, self.atlas = plan, atlas
        self.size_px, self.low_res_px = size_px, low_res_px
        self.generator = torch.Generator(atlas.device).manual_seed(plan.seed)
        self.captions = caption_table(make_tokenizer()).to(atlas.device)
        self.seen = torch.tensor(SEEN, device=atlas.device)
        self.shares = torch.tensor([form.share for form in FORMS], device=atlas.device)
        weights = 1 / make_scheduler(plan.name).alphas_cumprod.to(atlas.device)
        weights = weights.clamp(max=plan.weight_cap)
        self.weights = weights / weights.mean() / plan.batch

    def draw(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw token ids [B, T] int64, and the fields of a `Batch` except its text."""
        count, device, generator = self.plan.batch, self.atlas.device, self.generator
        things = self.seen[torch.randint(len(SEEN), (count,), generator=generator, device=device)]
        scenes, backgrounds = random_scenes(self.atlas, things, self.plan.scene_px, generator)
        forms = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        pixels = scenes if self.size_px == self.plan.scene_px else shrink(scenes, self.size_px)
        timesteps = self._levels()
        noise = torch.randn(pixels.shape, generator=generator, device=device)
        offset = torch.randn(count, 3, 1, 1, generator=generator, device=device)
        fields = {
            "pixels": pixels,
            "weight": self.weights[timesteps],
            "noise": noise + self.plan.noise_offset * offset,
            "timesteps": timesteps,
        }
        if self.low_res_px is not None:
            fields["low_res"] = shrink(scenes, self.low_res_px)
            fields["low_res_noise"] = torch.randn(pixels.shape, generator=generator, device=device)
            fields["noise_level"] = self._levels()
        return self.captions[forms, things, backgrounds].long(), fields

    def _levels(self) -> Tensor:
        shape, device = (self.plan.batch,), self.atlas.device
        return torch.randint(1000, shape, generator=self.generator, device=device)


class Average:
    """Exponential moving averages of some parameters."""

    def __init__(self, parameters: Iterable[Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters, faster in the first steps."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = [parameter.detach() for parameter in self.parameters]
        torch._foreach_lerp_(self.values, current, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the parameters."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


class StageTrainer:
    """One stage's networks and their optimizer."""

    def __init__(
        self,
        plan: Plan,
        device: str,
        text_encoder: T5EncoderModel | None = None,
        unet: UNet2DConditionModel | None = None,
    ) -> None:
        """Continue from a text encoder and a UNet, or start from new ones."""
        torch.manual_seed(plan.seed)
        self.plan, self.device = plan, device
        self.stage = STAGES[plan.stage]
        self.unet = (unet or make_unet(plan.name)).to(device).train()
        self.unet.to(memory_format=torch.channels_last)
        self.text_encoder = (text_encoder or make_text_encoder()).to(device)
        self.text_encoder.requires_grad_(text_encoder is None)
        self.schedulers = (make_scheduler(plan.name), make_noising_scheduler())
        self.tables = NoiseTables.of(self.schedulers[0], device)
        self.predict: Callable[..., tuple[Tensor, ...]] = torch.compile(
            self.unet, disable=device == "cpu"
        )
        self.text_parameters = [p for p in self.text_encoder.parameters() if p.requires_grad]
        groups = [{"params": list(self.unet.parameters())}, {"params": self.text_parameters}]
        self.optimizer = torch.optim.AdamW(
            groups, plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.unet_average = Average(self.unet.parameters(), plan.ema_decay)
        self.text_average = Average(self.text_parameters, plan.ema_decay)

    def step(self, tokens: Tensor, fields: dict[str, Tensor], learning_rate: float) -> Losses:
        """Update the weights once."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            encoded = self.text_encoder(tokens, (tokens != 0).long()).last_hidden_state
            batch = Batch(prompt_embeds=encoded.float(), **fields)
            noisy = add_noise(batch, self.schedulers[0])
            inputs = unet_inputs(self.stage, batch, noisy, self.schedulers, torch.float32)
            prediction = self.predict(**inputs, return_dict=False)[0]
        losses = hybrid_loss(
            prediction, batch.pixels, batch.noise, noisy, batch.timesteps, self.tables
        )
        torch.autograd.backward((losses.total * batch.weight).sum())
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.text_encoder.zero_grad()
        self.unet_average.update()
        if self.text_parameters:
            self.text_average.update()
        return losses

    def freeze_text(self) -> None:
        """Replace the text encoder by its average, which no longer changes.

        Its gradients are still computed: without them the UNet would have to be compiled again.
        """
        self.text_average.swap()
        self.optimizer.param_groups.pop()
        self.text_parameters = []

    def save(self, folder: Path) -> None:
        """Write the averaged stage in the published layout."""
        self.unet_average.swap()
        unet, text_encoder = make_unet(self.plan.name), make_text_encoder()
        unet.load_state_dict(self.unet.state_dict())
        text_encoder.load_state_dict(self.text_encoder.state_dict())
        self.unet_average.swap()
        save_stage(folder, self.plan.name, unet, text_encoder)


def train(trainer: StageTrainer, sampler: SceneSampler, folder: Path, seconds: float) -> int:
    """Train for the plan's steps, or as many as `seconds` allow; save, and return their number."""
    plan, steps = trainer.plan, trainer.plan.steps
    began = timed = time.monotonic()
    for step in range(steps):
        if step == plan.warmup_steps // 2:
            _wait(trainer.device)
            timed = time.monotonic()
        if step == plan.warmup_steps:
            _wait(trainer.device)
            pace = (time.monotonic() - timed) / (step - plan.warmup_steps // 2)
            steps = min(steps, step + int((seconds - (time.monotonic() - began)) / pace))
            log.info(f"{plan.name}: {1000 * pace:.1f} ms a step, {steps} steps")
        if step >= steps:
            break
        progress = step / steps
        if trainer.text_parameters and step > plan.warmup_steps and progress >= plan.text_share:
            trainer.freeze_text()
            trainer.save(folder)
        warm = min(1.0, (step + 1) / plan.warmup_steps)
        rate = plan.learning_rate * warm * (1 + math.cos(math.pi * progress)) / 2
        losses = trainer.step(*sampler.draw(), rate)
        if step % plan.log_every == 0:
            parts = f"mse {losses.mse.mean():.4f} bound {losses.bound.mean():.4f}"
            spent = time.monotonic() - began
            log.info(f"{plan.name} {step:6d} {parts} lr {rate:.1e} {spent:.0f} s")
    trainer.save(folder)
    return steps


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
