"""Conditioning: text for each stage, seeds, and pictures to start from."""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, TypeVar

from torch import Tensor

from adapters.arguments import check_seeds
from adapters.cascade.redraw import Given, Redraw, Way
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError, quote
from adapters.texts import check_texts

Item = TypeVar("Item")

Prompt: TypeAlias = str | Sequence[str]
"""One prompt, or several."""

MOST_PICTURES = 10_000
"""The most pictures of one call, whose encodings of T5-XXL take 13 GB."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The text, seeds and pictures that N pictures are drawn from; a slice covers some of the N.

    Shapes: T text tokens, D text width.
    """

    prompts: Mapping[int, Sequence[str]]
    """N by stage: encoded here for Stage I and II, read as text by Stage III."""
    prompt_embeds: Mapping[int, Tensor]
    """[N, T, D], for Stage I and II."""
    negative_prompts: Sequence[str]
    """N texts that guidance steers away from."""
    negative_embeds: Tensor
    """[N, T, D], the encodings of ``negative_prompts``."""
    seeds: Sequence[int]
    """N seeds, one for each picture."""
    clean_caption: bool = True
    """True if the encoded prompts were cleaned, which saved pictures record."""
    redraw: Redraw | None = None
    """N pictures to start from; ``None``: drawing starts from noise."""

    @property
    def way(self) -> Way:
        """The kind of drawing: from text alone, or from pictures."""
        return "text" if self.redraw is None else self.redraw.way

    @property
    def strength(self) -> Mapping[int, float]:
        """The strength in Stage I and II; empty when drawing from text alone."""
        return {} if self.redraw is None else self.redraw.strength

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice) -> "Conditioning":
        return Conditioning(
            prompts={stage: texts[rows] for stage, texts in self.prompts.items()},
            prompt_embeds={stage: embeds[rows] for stage, embeds in self.prompt_embeds.items()},
            negative_prompts=self.negative_prompts[rows],
            negative_embeds=self.negative_embeds[rows],
            seeds=self.seeds[rows],
            clean_caption=self.clean_caption,
            redraw=None if self.redraw is None else self.redraw.take(range(len(self))[rows]),
        )

    def arguments(self, stage: int) -> dict[str, Any]:
        """Make the arguments of a stage's pipeline, under its own names."""
        if stage not in self.prompt_embeds:
            negative = list(self.negative_prompts)
            return {"prompt": list(self.prompts[stage]), "negative_prompt": negative}
        text = {
            "prompt_embeds": self.prompt_embeds[stage],
            "negative_prompt_embeds": self.negative_embeds,
        }
        return text | ({} if self.redraw is None else self.redraw.arguments(stage))


class Options(TypedDict, total=False):
    """Options of :meth:`Cascade.__call__` besides the prompt and the pictures to start from."""

    stage_2_prompt: Prompt | None
    stage_3_prompt: Prompt | None
    negative_prompt: Prompt | None
    seed: int | Sequence[int]
    images_per_prompt: int
    sampling: Sampling | None
    low_res: Given | Tensor | None
    embeds: Mapping[str, Tensor] | None
    clean_caption: bool
    progress: bool | str


@dataclass(frozen=True)
class Layout:
    """The number of prompts, and of each prompt's pictures, which follow one another."""

    prompts: int
    each: int

    def spread(self, given: Sequence[Item], what: str) -> tuple[Item, ...]:
        """Spread items, one for all prompts or one for each, to one for each picture.

        Raises:
            UserError: if their number is neither; ``what`` names them in the message.
        """
        if len(given) not in (1, self.prompts):
            raise UserError(
                f"The {what} must be one for all prompts, or one for each of the {self.prompts}"
                f" (got {len(given)})."
            )
        per_prompt = given if len(given) == self.prompts else list(given) * self.prompts
        return tuple(item for item in per_prompt for _ in range(self.each))

    def seeds(self, seed: int | Sequence[int]) -> tuple[int, ...]:
        """List each picture's seed: consecutive numbers from one seed, or the given ones.

        Raises:
            UserError: if their number is not that of the pictures, or one cannot seed a generator.
        """
        count = self.prompts * self.each
        if isinstance(seed, numbers.Integral):
            check_seeds([seed, int(seed) + count - 1])
            return tuple(range(int(seed), int(seed) + count))
        seeds: Sequence[int] = list(seed) if isinstance(seed, Iterable) else [seed]
        check_seeds(seeds)
        if len(seeds) != count:
            raise UserError(
                f"The seeds must be one number, or one for each of the {count} pictures (got"
                f" {len(seeds)})."
            )
        return tuple(map(int, seeds))


def as_texts(given: Prompt | None) -> list[Any]:
    """List one or several texts, whose types are not checked."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    return list(given or ()) if several else [given]


def lay_out(
    prompts: Mapping[int, Prompt | None], each: int
) -> tuple[Layout, dict[int, tuple[str, ...]]]:
    """Spread prompts over pictures and stages.

    Args:
        prompts: by stage. Stage I has one or several; a later stage has one for all of them, or
            one for each; ``None``: those of the stage before.
        each: the number of pictures of each prompt.

    Returns:
        The layout, and each picture's prompt by stage.

    Raises:
        UserError: if there are none or too many, one is not a text, or a later stage's number does
            not fit.
    """
    texts: dict[int, list[Any]] = {
        stage: as_texts(own) for stage, own in prompts.items() if own is not None or stage == 1
    }
    check_texts(text for own in texts.values() for text in own)
    count = len(texts[1])
    if not isinstance(each, numbers.Integral) or count * each < 1:
        raise UserError(
            "There is nothing to draw; give a prompt, and images_per_prompt as a whole number from"
            f" 1 (got {each!r})."
        )
    if count * each > MOST_PICTURES:
        raise UserError(
            f"{count} prompts with {quote(each)} pictures each are more than the {MOST_PICTURES:,}"
            " that can be drawn at once; draw them in parts, with other seeds."
        )
    layout = Layout(count, int(each))
    every: dict[int, tuple[str, ...]] = {}
    for stage in prompts:
        every[stage] = every.get(stage - 1, ())
        if stage in texts:
            every[stage] = layout.spread(texts[stage], f"prompts for Stage {stage}")
    return layout, every
