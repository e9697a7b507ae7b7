"""Scores from the vectors of pictures that are drawn already; nothing is drawn or encoded here.

Shapes: N generated pictures, M training pictures, K reference pictures, E an encoder's width.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from finetune.evaluation.drawing import BASE, Shot, rows
from finetune.evaluation.intervals import Score, summarize
from finetune.evaluation.metrics import (
    diversities,
    faithfulness,
    frechet_distance,
    likeness,
    likeness_among,
    nearest,
    nearest_among,
)

Scores: TypeAlias = Mapping[str, Score | None]
"""Scores by name; ``None``: not defined, or not asked for."""

Vectors: TypeAlias = Mapping[str, Tensor]
"""Unit vectors of the same pictures by encoder, ``clip`` and, if it is named, ``dino``."""

TITLES = MappingProxyType(
    {
        "clip_i": "CLIP-I, generated vs. real pictures",
        "dino": "DINO, generated vs. real pictures",
        "clip_t": "CLIP-T, picture vs. prompt",
        "clip_t_others": "CLIP-T, prompts without the subject",
        "div": "DIV, among pictures of one prompt",
        "pres": "PRES, class vs. real pictures",
        "nearest": "nearest training picture",
        "copied": "share nearer than real pictures are",
        "frechet": "Fréchet distance to the reference",
    }
)
"""The titles of all scores, in their order."""

MEANINGS = MappingProxyType(
    {
        "clip_i": "The likeness to the subject: the mean cosine of each generated picture with all"
        " training pictures, by CLIP. Higher is better, up to the training pictures among"
        " themselves.",
        "dino": "The same by DINO, which tells one subject of a class from another better.",
        "clip_t": "The cosine of each picture with its prompt, in which the subject is in plain"
        " words, by CLIP. Higher is better.",
        "clip_t_others": "The same for prompts without the subject: a fall below the base's is"
        " what was forgotten.",
        "div": "How much pictures of one prompt differ: the mean of 1 - cosine. (DreamBooth's DIV"
        " is LPIPS, whose figures are not comparable.) Higher is better.",
        "pres": "The likeness of pictures of the class to the training pictures: how far the"
        " subject has taken over its class. Lower is better.",
        "nearest": "The cosine of each picture with the most similar training picture.",
        "copied": "The share of pictures that are more similar to a training picture than any two"
        " training pictures are to each other: copies, if it is high.",
        "frechet": "The Fréchet distance of the subject's pictures to the reference folder, of"
        " CLIP's vectors (FID takes an Inception network's, whose figures are not comparable)."
        " Lower is better; few pictures overestimate it.",
    }
)
"""The meaning of each score, for a report."""

ENCODERS = MappingProxyType({"clip": "CLIP", "dino": "DINO"})
"""The encoders' titles."""

BY_JUDGE = ("div", "pres", "nearest", "copied")
"""The scores by the encoder that tells subjects apart best, see :func:`choose_judge`."""


LIKENESS = MappingProxyType({"clip": "clip_i", "dino": "dino"})
"""The score of likeness to the training pictures, by encoder."""


def choose_judge(encoders: Collection[str]) -> str:
    """Choose the encoder of the scores :data:`BY_JUDGE`: DINO, as in DreamBooth, or else CLIP."""
    return "dino" if "dino" in encoders else "clip"


@dataclass(frozen=True)
class Values:
    """The values that a score is the mean of, in an order that all variants share."""

    values: tuple[float, ...]
    """One for each picture; not a number where it is missing."""
    groups: tuple[int, ...]
    """The prompt of each value."""

    def summarize(self) -> Score | None:
        """Average the values."""
        return summarize(self.values, self.groups)

    def minus(self, other: "Values") -> "Values":
        """Subtract another variant's values, pair by pair."""
        pairs = zip(self.values, other.values, strict=True)
        return Values(tuple(one - two for one, two in pairs), self.groups)


@dataclass(frozen=True)
class PictureScore:
    """The scores of a single picture, for a report."""

    clip_t: float
    likeness: float
    """The mean cosine with the training pictures."""
    nearest: int
    """The number of the most similar training picture."""
    similarity: float
    """The cosine with it."""


@dataclass(frozen=True)
class Measured:
    """All that is known of one variant's pictures."""

    values: Mapping[str, Values]
    """By score, of those that are defined."""
    pictures: tuple[PictureScore, ...]
    frechet: Score | None = None

    @property
    def scores(self) -> Scores:
        """The score of each name, with its interval."""
        found: dict[str, Score | None] = dict.fromkeys(TITLES)
        found |= {name: values.summarize() for name, values in self.values.items()}
        return found | {"frechet": self.frechet}

    def changes(self, base: "Measured") -> Scores:
        """Compute the change of each score from the base's, of pairs of one prompt and seed."""
        return {
            name: values.minus(base.values[name]).summarize()
            for name, values in self.values.items()
            if name in base.values
        }


@dataclass(frozen=True)
class Yardstick:
    """The vectors that pictures are measured against."""

    real: Vectors
    """The vectors of the training pictures, [M, E]."""
    texts: Tensor
    """CLIP's vectors of each shot's prompt in plain words, [N, E]."""
    shots: Sequence[Shot]
    reference: Tensor | None = None
    """CLIP's, of the reference pictures, [K, E]; ``None``: none are given."""

    @property
    def judge(self) -> str:
        """The encoder of the scores :data:`BY_JUDGE`."""
        return choose_judge(self.real)

    def ceiling(self) -> Scores:
        """Score the training pictures among themselves; ``None``: there is only one.

        Their DIV would say nothing, as they are not pictures of one prompt.
        """
        scores: dict[str, Score | None] = dict.fromkeys(("clip_i", "dino", "nearest"))
        judged = self.real[self.judge]
        if len(judged) < 2:
            return scores
        for name, encoder in (("clip_i", "clip"), ("dino", "dino")):
            if encoder in self.real:
                scores[name] = _summarize(likeness_among(self.real[encoder]))
        scores["nearest"] = _summarize(nearest_among(judged))
        return scores

    def measure(self, vectors: Vectors, missing: Sequence[bool]) -> Measured:
        """Score one variant's pictures.

        Args:
            vectors: the pictures', [N, E].
            missing: true for each picture that the safety checker has blackened, which is not
                scored.
        """
        lost = torch.tensor(missing)
        real, judged = self.real, vectors[self.judge]
        similarity, row = nearest(judged, real[self.judge])
        by_picture = {
            "clip_i": ("subject", likeness(vectors["clip"], real["clip"])),
            "clip_t": ("subject", faithfulness(vectors["clip"], self.texts)),
            "clip_t_others": ("others", faithfulness(vectors["clip"], self.texts)),
            "pres": ("class", likeness(judged, real[self.judge])),
            "nearest": ("subject", similarity),
        }
        if "dino" in vectors:
            by_picture["dino"] = ("subject", likeness(vectors["dino"], real["dino"]))
        if len(real[self.judge]) > 1:
            closest = nearest_among(real[self.judge]).max()
            by_picture["copied"] = ("subject", (similarity > closest).double())
        values = {}
        for name, (group, each) in by_picture.items():
            own = [number for number, shot in enumerate(self.shots) if shot.group == group]
            if own:
                kept = each.masked_fill(lost, torch.nan)
                values[name] = Values(
                    tuple(kept[own].tolist()), tuple(self.shots[number].place for number in own)
                )
        if apart := self._diversities(judged, missing):
            values["div"] = apart
        likes = likeness(judged, real[self.judge])
        faithful = faithfulness(vectors["clip"], self.texts)
        columns = (faithful.tolist(), likes.tolist(), row.tolist(), similarity.tolist())
        pictures = tuple(PictureScore(*each) for each in zip(*columns, strict=True))
        return Measured(values, pictures, self._frechet(vectors["clip"], missing))

    def _diversities(self, vectors: Tensor, missing: Sequence[bool]) -> Values | None:
        """Compute each picture's distance from the others of its prompt, whose mean is the DIV.

        Only if a prompt of the subject has two pictures or more.
        """
        own = list(rows(self.shots, "subject"))
        of_prompt = defaultdict(list)
        for number in own:
            of_prompt[self.shots[number].place].append(number)
        if max(map(len, of_prompt.values())) < 2:
            return None
        found = dict.fromkeys(own, float("nan"))
        for numbers in of_prompt.values():
            kept = [number for number in numbers if not missing[number]]
            if len(kept) > 1:
                found |= zip(kept, diversities(vectors[kept]).tolist(), strict=True)
        places = tuple(self.shots[number].place for number in own)
        return Values(tuple(found[number] for number in own), places)

    def _frechet(self, vectors: Tensor, missing: Sequence[bool]) -> Score | None:
        kept = [number for number in rows(self.shots, "subject") if not missing[number]]
        if self.reference is None or min(len(kept), len(self.reference)) < 2:
            return None
        return Score(frechet_distance(vectors[kept], self.reference), None, None, len(kept))


def _summarize(values: Iterable[float]) -> Score | None:
    listed = tuple(map(float, values))
    return summarize(listed, range(len(listed)))


def changes(measured: Mapping[str, Measured]) -> dict[str, Scores]:
    """Compute the changes of all variants from the base."""
    return {
        name: variant.changes(measured[BASE]) for name, variant in measured.items() if name != BASE
    }
