"""What pictures are drawn from: text for each stage, seeds, and pictures to start from."""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, TypeVar

from torch import Tensor

from adapters.cascade.redraw import Given, Redraw, Way
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError
from adapters.texts import check_texts

Item = TypeVar("Item")

Prompt: TypeAlias = str | Sequence[str]
"""One prompt, or several."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What N pictures are drawn from; a slice of it is what some of them are.

    Shapes: T text tokens, D text width.
    """

    prompt_embeds: Mapping[int, Tensor]
    """[N, T, D], for Stage I and II."""
    negative_embeds: Tensor
    """[N, T, D], what guidance leads away from."""
    seeds: Sequence[int]
    """N, of each picture."""
    prompts: Mapping[int, Sequence[str]]
    """N, by stage: what is encoded for Stage I and II, and what Stage III reads itself; none where
    only encodings were given."""
    negative_prompt: str | None = None
    """What ``negative_embeds`` encode, for Stage III; ``None``: the empty caption."""
    clean_caption: bool = True
    """Whether the encoded prompts were cleaned, for what pictures say of themselves."""
    redraw: Redraw | None = None
    """Pictures to start from, N; ``None``: pictures start from noise."""

    @property
    def way(self) -> Way:
        """What the pictures are drawn from."""
        return "text" if self.redraw is None else self.redraw.way

    @property
    def strength(self) -> Mapping[int, float]:
        """How far Stage I and II go from given pictures; none from text alone."""
        return {} if self.redraw is None else self.redraw.strength

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice) -> "Conditioning":
        return Conditioning(
            prompt_embeds={stage: embeds[rows] for stage, embeds in self.prompt_embeds.items()},
            negative_embeds=self.negative_embeds[rows],
            seeds=self.seeds[rows],
            prompts={stage: texts[rows] for stage, texts in self.prompts.items()},
            negative_prompt=self.negative_prompt,
            clean_caption=self.clean_caption,
            redraw=None if self.redraw is None else self.redraw.take(range(len(self))[rows]),
        )

    def arguments(self, stage: int) -> dict[str, Any]:
        """What a stage's pipeline takes of it, by its names for them."""
        if stage not in self.prompt_embeds:
            negative = [self.negative_prompt or ""] * len(self)
            return {"prompt": list(self.prompts[stage]), "negative_prompt": negative}
        text = {
            "prompt_embeds": self.prompt_embeds[stage],
            "negative_prompt_embeds": self.negative_embeds,
        }
        return text | ({} if self.redraw is None else self.redraw.arguments(stage))


class Options(TypedDict, total=False):
    """What :meth:`Cascade.__call__` takes beside the prompt and pictures to start from."""

    stage_2_prompt: Prompt | None
    stage_3_prompt: Prompt | None
    negative_prompt: str | None
    seed: int
    images_per_prompt: int
    sampling: Sampling | None
    low_res: Given | None
    embeds: Mapping[str, Tensor] | None
    clean_caption: bool
    progress: bool


def told(prompts: Mapping[int, Prompt | None], each: int) -> dict[int, tuple[str, ...]]:
    """What each stage is told to draw, once a picture.

    Args:
        prompts: by stage: of Stage I; of the others once for all of its prompts, or for each, or
            ``None``: as the stage before.
        each: how many pictures of each prompt, one after the other.

    Raises:
        UserError: where there are none, one is no text, or there is another number of a later
            stage.
    """
    given = {stage: own for stage, own in prompts.items() if own is not None or stage == 1}
    texts: dict[int, list[Any]] = {
        stage: list(own) if isinstance(own, Iterable) and not isinstance(own, str) else [own]
        for stage, own in given.items()
    }
    check_texts(text for own in texts.values() for text in own)
    count = len(texts[1])
    if not isinstance(each, numbers.Integral) or count * each < 1:
        raise UserError(
            "There is nothing to draw; give a prompt, and images_per_prompt as a whole number from"
            f" 1 (got {each!r})."
        )
    every = every_stage(texts, tuple(prompts))
    return {n: spread(own, count, each, f"prompts for Stage {n}") for n, own in every.items()}


def every_stage(given: Mapping[int, Item], stages: Sequence[int]) -> dict[int, Item]:
    """By stage; one that is not named has what the stage before it has."""
    if not given:
        return {}
    named = {stage: max((n for n in given if n <= stage), default=min(given)) for stage in stages}
    return {stage: given[name] for stage, name in named.items()}


def spread(given: Sequence[Item], prompts: int, each: int, what: str) -> tuple[Item, ...]:
    """One item for each picture.

    Args:
        given: one for all prompts, or one for each of them.
        prompts: how many prompts there are.
        each: how many pictures of each prompt, one after the other.
        what: the items, for the message.

    Raises:
        UserError: where they are neither.
    """
    if len(given) not in (1, prompts):
        raise UserError(
            f"The {what} must be one for all prompts, or one for each of the {prompts} (got"
            f" {len(given)})."
        )
    per_prompt = given if len(given) == prompts else list(given) * prompts
    return tuple(item for item in per_prompt for _ in range(each))
