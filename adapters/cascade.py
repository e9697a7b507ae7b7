"""The cascade: prompts in, the pictures of every stage out, with adapters merged into its UNets.

Shapes: N pictures, S a stage's picture size, s the size of the stage below, T text tokens, D text
width. Pixels are in [-1, 1].
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from diffusers import (
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

from adapters.bases import GUARDS, Source
from adapters.errors import UserError
from adapters.info import BaseSignature
from adapters.merge import MergedAdapters, StageAdapter
from adapters.sampling import Sampling

Stage: TypeAlias = "IFPipeline | IFSuperResolutionPipeline"

PRECISIONS: Mapping[str, tuple[torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.bfloat16),  # T5-XXL overflows in fp16
}
"""The precision of the UNets, and of the text encoder."""

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class CascadeImages:
    """The pictures of N samples; a stage that was not run has none."""

    stage_1: tuple[Image.Image, ...]
    stage_2: tuple[Image.Image, ...]
    stage_3: tuple[Image.Image, ...]
    prompts: tuple[str, ...]
    """The prompt of each picture; empty where only embeddings were given."""
    seeds: tuple[int, ...]
    """The seed of each picture."""
    low_res: Tensor
    """[N, 3, s, s] float32 on the CPU in [-1, 1]: Stage I's pictures before quantisation."""
    flagged: tuple[bool, ...]
    """Whether a safety checker has blackened the picture, in any stage."""

    @property
    def final(self) -> tuple[Image.Image, ...]:
        """The pictures of the last stage that was run."""
        return self.stage_3 or self.stage_2 or self.stage_1


@dataclass
class Cascade:
    """Stages I to III, each optional, one text encoder for I and II, and merged adapters."""

    stages: Mapping[int, Stage]
    """Stage I and II, by number; their text encoder is ``text``."""
    upscaler: StableDiffusionUpscalePipeline | None
    """Stage III, with its own text encoder."""
    text: IFPipeline | None
    """The tokenizer and text encoder; ``None``: embeddings must be given."""
    base_names: Mapping[int, str]
    """The bases' names, for messages."""
    merged: dict[int, MergedAdapters] = field(init=False)

    def __post_init__(self) -> None:
        self.merged = {number: MergedAdapters(pipe.unet) for number, pipe in self.stages.items()}

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
        """
        distinct = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in distinct for _ in range(images_per_prompt)]
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
        batch_size: int = 8,
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
            batch_size: how many pictures to sample at a time.
            prompts: N; Stage III reads them, and the result names them.
            negative_prompt: of Stage III.
            progress: show progress bars.

        Raises:
            UserError: where Stage I is needed and absent, or Stage III lacks prompts.
        """
        sampling = sampling or Sampling()
        if low_res is None and 1 not in self.stages:
            raise UserError("Stage I was not loaded; load it, or hand sample() low_res pictures.")
        if self.upscaler is not None and prompts is None:
            raise UserError("Stage III reads the prompts themselves; hand sample() prompts too.")
        parts = []
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
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
        return _joined(parts)

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
        settings: dict[int, dict[str, Any]] = {
            1: {
                "num_inference_steps": sampling.stage_1_steps,
                "guidance_scale": sampling.stage_1_guidance,
            },
            2: {
                "num_inference_steps": sampling.stage_2_steps,
                "guidance_scale": sampling.stage_2_guidance,
                "noise_level": sampling.noise_level,
            },
        }
        pictures: dict[int, tuple[Image.Image, ...]] = {1: (), 2: (), 3: ()}
        flagged = [False] * len(seeds)
        pixels = low_res
        for number, pipe in self.stages.items():
            if number == 1 and low_res is not None:
                continue
            source = {} if number == 1 else {"image": pixels}
            pipe.set_progress_bar_config(desc=f"Stage {number}", disable=not progress, leave=False)
            with _evaluating(pipe.unet):
                pixels = pipe(
                    **embeds,
                    **source,
                    **settings[number],
                    generator=_generators(seeds),
                    output_type="pt",
                ).images
            pictures[number], flags = finish(pipe, pixels)
            flagged = [old or new for old, new in zip(flagged, flags, strict=True)]
            if number == 1:
                low_res = pixels
        if self.upscaler is not None:
            assert pixels is not None
            assert prompts is not None
            pipe = self.upscaler
            pipe.set_progress_bar_config(desc="Stage 3", disable=not progress, leave=False)
            result = pipe(
                list(prompts),
                image=(pixels / 2 + 0.5).clamp(0, 1),
                num_inference_steps=sampling.stage_3_steps,
                guidance_scale=sampling.stage_3_guidance,
                noise_level=sampling.stage_3_noise_level,
                negative_prompt=[negative_prompt or ""] * len(prompts),
                generator=_generators(seeds),
            )
            pictures[3] = tuple(result.images)
            flags = result.nsfw_content_detected or flagged
            flagged = [old or new for old, new in zip(flagged, flags, strict=True)]
        assert low_res is not None
        return CascadeImages(
            stage_1=pictures[1],
            stage_2=pictures[2],
            stage_3=pictures[3],
            prompts=tuple(prompts or ()),
            seeds=tuple(seeds),
            low_res=low_res.detach().float().cpu(),
            flagged=tuple(flagged),
        )

    def add_adapter(self, folder: str | Path, scale: float = 1.0) -> None:
        """Merge an exported adapter into the stages that it and this cascade have.

        Whether an adapter belongs to a base is decided by the base's weights, not by its name,
        since folders move and hub repositories are mirrored: the UNet's configuration and the first
        values of its first bias, recorded at export, must be those of this cascade's UNet.

        Args:
            folder: an exported folder (with ``stage_1``, ``stage_2`` or both in it), or one of
                these.
            scale: how much of it: each weight W becomes W + scale * (W merged - W). Adapters that
                are added one after the other add up.

        Raises:
            UserError: where the folder has no adapter for a stage of this cascade, or one that was
                trained on another base. Nothing is merged then.
        """
        adapters = [StageAdapter.load(place) for place in stage_folders(Path(folder))]
        fitting = [adapter for adapter in adapters if adapter.info.stage in self.stages]
        if not fitting:
            raise UserError(
                f"{folder} has an adapter of Stage"
                f" {' and '.join(str(adapter.info.stage) for adapter in adapters)}, but this"
                f" cascade has Stage {' and '.join(map(str, self.stages))}; load the stage that it"
                " belongs to."
            )
        for adapter in fitting:
            self._check_base(adapter)
        for adapter in fitting:
            self.merged[adapter.info.stage].add(adapter, scale)

    def _check_base(self, adapter: StageAdapter) -> None:
        info = adapter.info
        assert info.base_signature is not None
        own = BaseSignature.of(self.stages[info.stage].unet)
        difference = info.base_signature.difference(own)
        if difference is not None:
            raise UserError(
                f"The adapter {adapter.folder} was trained on Stage {info.stage} of"
                f" {info.base_model!r}, not of {self.base_names[info.stage]!r} ({difference}); load"
                " the cascade from the base it was trained on."
            )

    def remove_adapters(self) -> None:
        """Take all adapters out; every weight is the base's own again, to the bit."""
        for merged in self.merged.values():
            merged.remove()


def stage_folders(folder: Path) -> list[Path]:
    """The stage folders of an exported folder; itself where it is one.

    Raises:
        UserError: where it is neither.
    """
    inside = [folder / name for name in ("stage_1", "stage_2") if (folder / name).is_dir()]
    if inside:
        return inside
    if (folder / "adapter_config.json").is_file():
        return [folder]
    raise UserError(
        f"{folder} has no exported adapter (no stage_1, stage_2 or adapter_config.json in it); name"
        " the adapters folder of a finished run."
    )


def finish(pipe: Stage, pixels: Tensor) -> tuple[tuple[Image.Image, ...], list[bool]]:
    """Pictures as the pipeline finishes them: checked by its safety checker, then watermarked.

    Steps 8 to 11 of ``IFPipeline.__call__``, which it takes for ``output_type="pil"`` only.

    Args:
        pipe: the stage's pipeline.
        pixels: [N, 3, S, S] in [-1, 1].

    Returns:
        The pictures, and which of them were blackened.
    """
    images = (pixels / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
    dtype = pipe.unet.dtype if pipe.safety_checker is None else pipe.safety_checker.dtype
    images, nsfw, watermarked = pipe.run_safety_checker(images, pixels.device, dtype)
    pictures = pipe.numpy_to_pil(images)
    if pipe.watermarker is not None:
        pipe.watermarker.apply_watermark(pictures, pipe.unet.config.sample_size)
    none = [False] * len(pictures)
    flags = [one or two for one, two in zip(nsfw or none, watermarked or none, strict=True)]
    return tuple(pictures), flags


def load_cascade(
    stage_1: str | Path | None = None,
    stage_2: str | Path | None = None,
    stage_3: str | Path | None = None,
    *,
    adapters: Sequence[str | Path] = (),
    scale: float = 1.0,
    revision: str | None = None,
    variant: str | None = None,
    device: str | torch.device = "auto",
    dtype: Precision = "auto",
    text_encoder: bool = True,
    unets: Mapping[int, UNet2DConditionModel] | None = None,
) -> Cascade:
    """Load a cascade with diffusers' own pipelines, guards and all.

    Args:
        stage_1: Stage I, a folder or a hub name; ``None``: only given pictures are upsampled.
        stage_2: Stage II.
        stage_3: the x4 upscaler. It is guarded by the modules of the stage before it, as the
            published cascade's is.
        adapters: exported folders to merge, see :meth:`Cascade.add_adapter`.
        scale: of these adapters.
        revision: the hub revision of Stage I and II.
        variant: the weights' variant of Stage I and II, such as ``fp16``.
        device: ``auto``: the GPU where there is one.
        dtype: ``auto``: bf16 on a GPU, fp32 elsewhere.
        text_encoder: whether to load the text encoder of Stage I (of Stage II where that is alone).
        unets: UNets to sample from instead of loading them, by stage; they keep their precision.

    Raises:
        UserError: where a model or an adapter is not there or does not fit.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if dtype == "auto":
        dtype = "fp32" if device.type == "cpu" else "bf16"
    unet_dtype, text_dtype = PRECISIONS[dtype]
    sources = {
        number: Source(str(name), number, revision, variant)
        for number, name in ((1, stage_1), (2, stage_2))
        if name is not None
    }
    if not sources:
        raise UserError("A cascade needs Stage I, Stage II or both; name at least one model.")
    given = {number: {"unet": unet} for number, unet in (unets or {}).items()}
    no_text = {"text_encoder": None, "tokenizer": None}
    stages = {
        number: source.pipeline(unet_dtype, **no_text, **given.get(number, {})).to(device)
        for number, source in sources.items()
    }
    text = None
    if text_encoder:
        # it draws no pictures, so it has nothing to guard
        no_pictures = dict.fromkeys(("unet", *GUARDS)) | {"requires_safety_checker": False}
        text = sources[min(sources)].pipeline(text_dtype, **no_pictures).to(device)
    upscaler = None
    if stage_3 is not None:
        last = stages[max(stages)]
        upscaler = Source(str(stage_3), 3).pipeline(unet_dtype).to(device)
        guards = {name: last.components[name] for name in GUARDS}
        upscaler.register_modules(**{name: guard for name, guard in guards.items() if guard})
    names = {number: source.name for number, source in sources.items()}
    cascade = Cascade(stages, upscaler, text, names)
    for folder in adapters:
        cascade.add_adapter(folder, scale)
    return cascade


@contextmanager
def _evaluating(unet: UNet2DConditionModel) -> Iterator[None]:
    """A UNet in training samples without dropout."""
    training = unet.training
    unet.eval()
    try:
        yield
    finally:
        unet.train(training)


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator a picture, on the CPU so that every device draws the same."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _joined(parts: Sequence[CascadeImages]) -> CascadeImages:
    def together(name: str) -> tuple[Any, ...]:
        return tuple(item for part in parts for item in vars(part)[name])

    tuples = ("stage_1", "stage_2", "stage_3", "prompts", "seeds", "flagged")
    low_res = torch.cat([part.low_res for part in parts])
    return CascadeImages(**{name: together(name) for name in tuples}, low_res=low_res)
