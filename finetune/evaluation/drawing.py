"""The pictures of an evaluation: every variant of the cascade draws the same prompts and seeds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from adapters import load_cascade
from adapters.arguments import Scale
from adapters.cascade.cascade import Cascade
from adapters.cascade.load import Parts
from adapters.cascade.results import Sample
from adapters.cascade.sampling import Sampling
from adapters.files.places import adapter_path, stage_folders
from adapters.progress import Bar
from finetune.data.captions import (
    CaptionCache,
    PromptEmbeds,
    collect_prompts,
    embed_captions,
)
from finetune.evaluation.base_pictures import BasePictures, keep_batch, read_batch
from finetune.recipe.schema import Evaluation, Recipe

Group: TypeAlias = Literal["subject", "others", "class"]
"""The kinds of prompts: with the subject, about other things, about the subject's class."""

Adapters: TypeAlias = Mapping[str, Scale]
"""Exported folders, other tools' files or hub names, each with its scale."""

BASE, FINE_TUNED = "base", "fine_tuned"


@dataclass(frozen=True)
class Shot:
    """A picture to draw with each variant."""

    group: Group
    place: int
    """The prompt's place among all prompts."""
    number: int
    """The picture's number among those of its prompt."""
    prompt: str
    stage_2_prompt: str
    text: str
    """The prompt in plain words, for the text score."""
    seed: int


def list_shots(settings: Evaluation) -> tuple[Shot, ...]:
    """List the pictures to draw, prompt by prompt, for each number in turn."""
    groups: dict[Group, tuple[str, ...]] = {
        "subject": settings.prompts,
        "others": settings.other_prompts,
        "class": settings.class_prompts,
    }
    prompts = [(group, prompt) for group, texts in groups.items() for prompt in texts]
    second = dict(enumerate(settings.stage_2_prompts or ()))
    return tuple(
        Shot(
            group=group,
            place=place,
            number=number,
            prompt=prompt,
            stage_2_prompt=second.get(place, prompt),
            text=prompt.replace(settings.identifier, settings.subject),
            seed=settings.seed_of(place, number),
        )
        for number in range(settings.pictures_per_prompt)
        for place, (group, prompt) in enumerate(prompts)
    )


def check_adapters(adapters: Adapters) -> None:
    """Raise a UserError if there is no adapter in one of the places."""
    for name in adapters:
        stage_folders(adapter_path(name))


def draw_variants(
    recipe: Recipe,
    settings: Evaluation,
    shots: Sequence[Shot],
    adapters: Adapters,
    device: torch.device,
    *,
    apart: bool = False,
) -> dict[str, tuple[Sample, ...]]:
    """Draw all shots with the base and with the adapters.

    The base's pictures are read where an earlier evaluation has drawn them.

    Args:
        recipe: the run's recipe.
        settings: its section.
        shots: the pictures to draw.
        adapters: the adapters of the fine-tuned cascade, together; none: only the base is drawn.
        device: the device that draws.
        apart: draw with each stage's adapters alone as well, if both stages have some.

    Returns:
        The pictures by variant: ``base``, ``fine_tuned``, and ``stage_1`` and ``stage_2``.

    Raises:
        UserError: if a model or adapter does not load, or a setting does not suit it.
    """
    desk = Desk.of(recipe, settings, shots, device)
    for name, scale in adapters.items():
        desk.cascade.add_adapter(name, scale)
    variants = _variants(desk.cascade, apart=apart)
    drawn: dict[str, tuple[Sample, ...]] = {}
    with Bar(total=len(variants) * len(shots), desc="Drawing") as progress:
        for variant, scales in variants.items():
            progress.set_postfix_str(variant)
            drawn[variant] = desk.draw(scales, progress) if scales else desk.draw_base(progress)
    return drawn


@dataclass(frozen=True)
class Desk:
    """A cascade and all it needs to draw the same shots again and again."""

    cascade: Cascade
    shots: Sequence[Shot]
    embeds: PromptEmbeds
    """The encodings of the shots' prompts."""
    sampling: Sampling
    clean_caption: bool
    kept: BasePictures
    """The base's pictures that have been drawn before."""

    @classmethod
    def of(
        cls, recipe: Recipe, settings: Evaluation, shots: Sequence[Shot], device: torch.device
    ) -> "Desk":
        """Encode the shots' prompts, and load the recipe's base.

        Raises:
            UserError: if a model does not load.
        """
        written = collect_prompts(recipe)
        needed = {text for shot in shots for text in (shot.prompt, shot.stage_2_prompt)}
        captions = {text: written[text] for text in sorted({*needed, ""})}
        embeds = embed_captions(captions, CaptionCache.of(recipe, device))
        cascade = load_cascade(
            recipe.base.stage_1,
            recipe.base.stage_2,
            recipe.base.stage_3,
            revision=recipe.base.revision,
            variant=recipe.base.variant,
            device=device,
            dtype=recipe.precisions_on(device),
            parts=Parts(text_encoder=False),
        )
        sampling = settings.sampling or recipe.validation.sampling
        kept = BasePictures.of(recipe, sampling, device)
        return cls(cascade, shots, embeds, sampling, recipe.text.clean_caption, kept)

    def draw(self, scales: Mapping[str, Scale], progress: "Bar[Any]") -> tuple[Sample, ...]:
        """Draw all shots with some of the cascade's adapters."""
        self.cascade.set_adapters(scales)
        samples: list[Sample] = []
        for batch in self._batches():
            samples += self._draw(batch)
            progress.update(len(batch))
        return tuple(samples)

    def draw_base(self, progress: "Bar[Any]") -> tuple[Sample, ...]:
        """Draw all shots without adapters; read those that have been drawn before."""
        self.cascade.set_adapters({})
        samples: list[Sample] = []
        with self.kept.alone():  # of evaluations at once, one draws and the others read
            for batch in self._batches():
                folder = self.kept.place(batch, self.embeds)
                if (drawn := read_batch(folder, len(batch))) is None:
                    drawn = self._draw(batch)
                    keep_batch(folder, drawn)
                samples += drawn
                progress.update(len(batch))
        return tuple(samples)

    def _batches(self) -> Iterator[Sequence[Shot]]:
        size = self.sampling.batch_size
        return (self.shots[start : start + size] for start in range(0, len(self.shots), size))

    def _draw(self, batch: Sequence[Shot]) -> tuple[Sample, ...]:
        drawn = self.cascade(
            [shot.prompt for shot in batch],
            stage_2_prompt=[shot.stage_2_prompt for shot in batch],
            embeds=self.embeds,
            seed=[shot.seed for shot in batch],
            sampling=self.sampling,
            clean_caption=self.clean_caption,
            progress=False,
        )
        return tuple(drawn)


def _variants(cascade: Cascade, *, apart: bool) -> dict[str, dict[str, dict[int, float]]]:
    """List the scales of the loaded adapters in each variant."""
    loaded = cascade.adapters
    variants: dict[str, dict[str, dict[int, float]]] = {BASE: {}}
    if loaded:
        variants[FINE_TUNED] = dict(loaded)
    stages = sorted({stage for scales in loaded.values() for stage in scales})
    for stage in stages if apart and len(stages) > 1 else ():
        variants[f"stage_{stage}"] = {
            name: {stage: scales[stage]} for name, scales in loaded.items() if stage in scales
        }
    return variants


def rows(shots: Sequence[Shot], group: Group) -> Iterator[int]:
    """Yield the places of a group's shots in the list."""
    return (row for row, shot in enumerate(shots) if shot.group == group)
