"""The figures of a validation: their tags in TensorBoard, and their history in a run.

TensorBoard sorts groups of tags by name, so the groups' names are chosen for their order: ``drawn``
(pictures), ``fidelity``, ``forgetting``, ``loss``, ``optimizer``, ``reference``, ``speed``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

CLIP_I = "fidelity/clip_i"
"""Likeness to the subject: the mean cosine of generated and training pictures."""

CLIP_T = "fidelity/clip_t"
"""Likeness to the prompts: the mean cosine of each picture and its prompt."""

NEAREST = "fidelity/nearest_photo"
"""Copying: the mean cosine of each generated picture and the training picture nearest to it."""

SAMENESS = "fidelity/sameness"
"""Collapse: the mean cosine of the pictures of different prompts."""

OTHERS_CLIP_T = "forgetting/others_clip_t"
"""CLIP-T of the prompts without the subject."""

OTHERS_CLIP_I = "forgetting/others_clip_i"
"""Likeness to the subject of pictures that should not show it."""

FIXED_NOISE = "loss/fixed_noise"
"""The squared error on training pictures at fixed noise."""

HELD_OUT = "loss/held_out"
"""The same on pictures held out of training."""

FLOORED = (CLIP_I, CLIP_T, OTHERS_CLIP_T, OTHERS_CLIP_I)
"""The figures whose value of the base is plotted beside them."""


def floor_of(tag: str) -> str:
    """Return the tag of the base's value of a figure."""
    return f"reference/{tag.rpartition('/')[2]}_base"


def ceiling_of(tag: str) -> str:
    """Return the tag of what real pictures reach of a figure."""
    return f"reference/{tag.rpartition('/')[2]}_ceiling"


@dataclass(frozen=True)
class Validated:
    """One validation."""

    step: int
    figures: Mapping[str, float] = field(default_factory=dict)
    """The figures by tag; absent: not measured."""
    by_picture: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The values by picture of some of the figures, which are their means."""


def add_floors(figures: Mapping[str, float], first: Mapping[str, float]) -> dict[str, float]:
    """Add to the figures of a validation the base's, which are those of the first validation."""
    floors = {floor_of(tag): first[tag] for tag in FLOORED if tag in figures and tag in first}
    return dict(figures) | floors
