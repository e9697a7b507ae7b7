"""The cascade: prompts in, the pictures of every stage out, with adapters merged into its UNets.

Shapes: N pictures, S a stage's picture size, s the size of the stage below, T text tokens, D text
width. Pixels are in [-1, 1].
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    IFPipeline,
    SchedulerMixin,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

from adapters.adapted import AdaptedStages
from adapters.errors import UserError
from adapters.images import CascadeImages, finish, joined
from adapters.overview import as_html, as_text, overview
from adapters.sampling import Sampling
from unets.graphs import Replayed


@dataclass(kw_only=True)
class Cascade(AdaptedStages):
    """Stages I to III, each optional, one text encoder for I and II, and merged adapters."""

    upscaler: StableDiffusionUpscalePipeline | None
    """Stage III, with its own text encoder."""
    text: IFPipeline | None
    """The tokenizer and text encoder of Stage I and II; ``None``: embeddings must be given."""

    def __repr__(self) -> str:
        return as_text(self._overview())

    def _repr_html_(self) -> str:
        return as_html(self._overview())

    def _overview(self) -> list[Sequence[str]]:
        return overview(self._pipelines(), self.text, self.base_names, self.merged)

    def _pipelines(self) -> dict[int, DiffusionPipeline]:
        """The pipelines of all stages, by number."""
        return dict(self.stages) | ({} if self.upscaler is None else {3: self.upscaler})

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        images_per_prompt: int = 1,
        sampling: Sampling | None = None,
        clean_caption: bool = True,
        progress: bool = True,
    ) -> CascadeImages:
        """Sample pictures of prompts.

        Args:
            prompt: one prompt, or several.
            negative_prompt: what guidance leads away from; ``None``: the empty caption.
            seed: the first picture's seed; each further picture's is one more.
            images_per_prompt: how many pictures of each prompt, one after the other.
            sampling: steps and guidance; ``None``: the published pipelines' defaults.
            clean_caption: clean prompts as IF's pipelines do by default.
            progress: show progress bars.

        Raises:
            UserError: where there is nothing to draw, and as :meth:`sample`.

        Example:
            >>> few = Sampling(stage_1_steps=4, stage_2_steps=2)
            >>> images = cascade("a car on a pink background", images_per_prompt=2, sampling=few)
            >>> images
            CascadeImages(2 pictures, 32 → 128 px, of 'a car on a pink background')
            >>> images.final[0].save("car.png")
        """
        distinct = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in distinct for _ in range(images_per_prompt)]
        if not prompts:
            raise UserError("There is nothing to draw; give a prompt, and images_per_prompt >= 1.")
        embeds = self.encode(distinct, clean_caption=clean_caption)
        negative = self.encode([negative_prompt or ""], clean_caption=clean_caption)
        return self.sample(
            embeds.repeat_interleave(images_per_prompt, dim=0),
            negative.expand(len(prompts), -1, -1),
            seeds=range(seed, seed + len(prompts)),
            sampling=sampling,
            prompts=prompts,
            negative_prompt=negative_prompt,
            progress=progress,
        )

    def encode(self, prompts: Sequence[str], *, clean_caption: bool = True) -> Tensor:
        """Encode prompts along the path of ``IFPipeline.__call__``, [N, T, D] on the device."""
        if self.text is None:
            raise UserError(
                "This cascade was loaded without a text encoder; load it with text_encoder=True, or"
                " hand sample() the embeddings."
            )
        embeds, _ = self.text.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, clean_caption=clean_caption
        )
        return embeds

    def sample(
        self,
        prompt_embeds: Tensor,
        negative_embeds: Tensor,
        *,
        seeds: Sequence[int],
        sampling: Sampling | None = None,
        low_res: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        progress: bool = True,
    ) -> CascadeImages:
        """Sample pictures from text embeddings.

        Each picture draws from generators of its own, so it does not depend on its neighbours in a
        batch (beyond rounding), and Stage II's noise does not depend on Stage I's steps.

        Args:
            prompt_embeds: [N, T, D].
            negative_embeds: [N, T, D], what guidance leads away from: the encoding of ``""``.
            seeds: of each picture, N.
            sampling: steps and guidance; ``None``: the published pipelines' defaults.
            low_res: [N, 3, s, s] in [-1, 1]: upsample these; Stage I is not run.
            prompts: N; Stage III reads them, and the result names them.
            negative_prompt: of Stage III.
            progress: show progress bars.

        Raises:
            UserError: where Stage I is needed and absent, Stage III lacks prompts, or a setting
                exceeds what a stage's scheduler knows.
        """
        sampling = sampling or Sampling()
        if low_res is None and 1 not in self.stages:
            raise UserError("Stage I was not loaded; load it, or hand sample() low_res pictures.")
        if self.upscaler is not None and prompts is None:
            raise UserError("Stage III reads the prompts themselves; hand sample() prompts too.")
        for name, limit in self._limits().items():
            if (value := vars(sampling)[name]) > limit:
                raise UserError(f"{name} is {value}, but this cascade allows {limit}; lower it.")
        parts = []
        for start in range(0, len(seeds), sampling.batch_size):
            part = slice(start, start + sampling.batch_size)
            parts.append(
                self._sample_batch(
                    prompt_embeds[part],
                    negative_embeds[part],
                    seeds[part],
                    sampling,
                    None if low_res is None else low_res[part],
                    None if prompts is None else prompts[part],
                    negative_prompt,
                    progress,
                )
            )
        return joined(parts)

    def _limits(self) -> dict[str, int]:
        """The largest values of sampling settings, from the schedulers of the stages."""
        limits = {
            f"stage_{number}_steps": _timesteps(pipe.scheduler)
            for number, pipe in self._pipelines().items()
        }
        if 2 in self.stages:
            limits["noise_level"] = _timesteps(self.stages[2].image_noising_scheduler) - 1
        if self.upscaler is not None:
            limits["stage_3_noise_level"] = self.upscaler.config.max_noise_level
        return limits

    def _sample_batch(
        self,
        prompt_embeds: Tensor,
        negative_embeds: Tensor,
        seeds: Sequence[int],
        sampling: Sampling,
        low_res: Tensor | None,
        prompts: Sequence[str] | None,
        negative_prompt: str | None,
        progress: bool,
    ) -> CascadeImages:
        embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_embeds}
        pictures: dict[int, tuple[Image.Image, ...]] = {1: (), 2: (), 3: ()}
        flags: list[list[bool]] = [[False] * len(seeds)]
        pixels = low_res
        for number, pipe in self.stages.items():
            if number == 1 and low_res is not None:
                continue
            below = {} if pixels is None else {"image": pixels}
            settings = _settings(pipe, number, seeds, sampling, progress)
            with _evaluating(pipe.unet), _replaying(pipe.unet, self.recorded[number]):
                pixels = pipe(**embeds, **below, **settings, output_type="pt").images
            pictures[number], blackened = finish(pipe, pixels)
            flags.append(blackened)
            low_res = pixels if number == 1 else low_res
        assert pixels is not None
        assert low_res is not None
        if self.upscaler is not None and prompts is not None:
            result = self.upscaler(
                list(prompts),
                image=(pixels / 2 + 0.5).clamp(0, 1),
                negative_prompt=[negative_prompt or ""] * len(prompts),
                **_settings(self.upscaler, 3, seeds, sampling, progress),
            )
            pictures[3] = tuple(result.images)
            flags.append(result.nsfw_content_detected or flags[0])
        return CascadeImages(
            stage_1=pictures[1],
            stage_2=pictures[2],
            stage_3=pictures[3],
            prompts=tuple(prompts or ()),
            seeds=tuple(seeds),
            low_res=low_res.float().cpu(),
            flagged=tuple(any(stages) for stages in zip(*flags, strict=True)),
        )


def _timesteps(scheduler: SchedulerMixin) -> int:
    return int(scheduler.config.num_train_timesteps)


@contextmanager
def _evaluating(unet: UNet2DConditionModel) -> Iterator[None]:
    """A UNet in training samples without dropout."""
    training = unet.training
    unet.eval()
    try:
        yield
    finally:
        unet.train(training)


@contextmanager
def _replaying(unet: UNet2DConditionModel, recorded: Replayed[Tensor]) -> Iterator[None]:
    """A UNet whose forward pass, as IF's pipelines call it, is replayed."""

    def forward(sample: Tensor, timestep: Tensor, **inputs: Any) -> tuple[Tensor]:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        return (recorded(sample=sample, timestep=timestep, **tensors),)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward


def _settings(
    pipe: DiffusionPipeline, number: int, seeds: Sequence[int], sampling: Sampling, progress: bool
) -> dict[str, Any]:
    """A stage's settings as its pipeline takes them, and its progress bar.

    One generator a picture, on the CPU so that every device draws the same.
    """
    pipe.set_progress_bar_config(desc=f"Stage {number}", disable=not progress, leave=False)
    return sampling.arguments(number) | {
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds]
    }
