"""Runs that go wrong, recognised from the figures of their validations.

Each row of :data:`SYMPTOMS` is a function of the history alone, and a sentence that says what is
wrong and what to change.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from finetune.run.chance import is_certain
from finetune.run.figures import (
    CLIP_I,
    CLIP_T,
    FIXED_NOISE,
    HELD_OUT,
    NEAREST,
    OTHERS_CLIP_I,
    OTHERS_CLIP_T,
    SAMENESS,
    Validated,
    ceiling_of,
)

RISE = 1.1
"""The ratio of a loss to its lowest value from which it counts as risen."""

DROP = 0.9
"""The ratio of a CLIP-T to its best value, or the base's, below which it counts as fallen."""

LEAST_FALL = 0.01
"""The smallest drop of a CLIP-T that counts as a fall; near 0, a ratio means nothing."""

SPILL = 0.5
"""The gain in likeness to the subject of other prompts' pictures, as a part of the gain of the
subject's own, from which the subject leaks."""

LEAST_SPILL = 0.05
"""The least gain in that likeness that counts as leaking."""

LEAST_GAIN = 0.01
"""The least CLIP-I above the base's that counts as learnt."""


@dataclass(frozen=True)
class Course:
    """The course of a run so far."""

    history: Sequence[Validated]
    steps: int
    """The steps that the run will have."""

    def curve(self, tag: str) -> list[float]:
        """Return the values of a figure, where it was measured, first to last."""
        return [each.figures[tag] for each in self.history if tag in each.figures]

    def has_changed(self, tag: str) -> bool:
        """Tell whether a figure differs from the base's by more than chance."""
        return is_certain(self.history[0], self.history[-1], tag)

    def last(self, tag: str) -> float | None:
        """Return the newest value of a figure; ``None``: the last validation has none."""
        return self.history[-1].figures.get(tag)


def rising(values: Sequence[float]) -> bool:
    """Tell whether values rose twice in a row, to well above their lowest."""
    return len(values) >= 3 and min(values) * RISE < values[-1] > values[-2] > values[-3]


def _gain(values: Sequence[float]) -> float:
    """Return the gain of the last value over the first; none is a gain of 0."""
    return values[-1] - values[0] if values else 0.0


def _fallen(now: float, before: float) -> bool:
    """Tell whether a CLIP-T is well below an earlier one, which may be 0 or negative."""
    return before - now > max((1 - DROP) * before, LEAST_FALL)


def diverges(course: Course) -> bool:
    """Recognise a loss on training pictures that rises, or is no longer a finite number."""
    loss = course.curve(FIXED_NOISE)
    return rising(loss) or not all(map(math.isfinite, loss[-1:]))


def memorises(course: Course) -> bool:
    """Recognise a loss that rises on held-out pictures only."""
    return rising(course.curve(HELD_OUT)) and not diverges(course)


def collapses(course: Course) -> bool:
    """Recognise pictures of different prompts that become one, while prompts are followed less.

    Pictures of one subject are alike by nature, so the measure is the likeness among the training
    pictures: half way from there to 1.
    """
    alike, text = course.curve(SAMENESS), course.curve(CLIP_T)
    natural = course.last(ceiling_of(CLIP_I)) or (alike[0] if alike else 1.0)
    one = bool(alike) and alike[-1] > (1 + natural) / 2
    return one and bool(text) and _fallen(text[-1], max(text))


def leaks(course: Course) -> bool:
    """Recognise other prompts that are followed less, or whose pictures show the subject."""
    text, image, own = (course.curve(tag) for tag in (OTHERS_CLIP_T, OTHERS_CLIP_I, CLIP_I))
    forgotten = bool(text) and _fallen(text[-1], text[0])
    spilt = _gain(image) > max(SPILL * _gain(own), LEAST_SPILL)
    return (forgotten and course.has_changed(OTHERS_CLIP_T)) or (
        spilt and course.has_changed(OTHERS_CLIP_I)
    )


def copies(course: Course) -> bool:
    """Recognise pictures nearer to training pictures than these are to one another."""
    nearest, real = course.last(NEAREST), course.last(ceiling_of(NEAREST))
    return nearest is not None and real is not None and nearest > real


def learns_nothing(course: Course) -> bool:
    """Recognise a likeness to the subject that is the base's after half of the steps."""
    likeness, late = course.curve(CLIP_I), course.history[-1].step >= course.steps / 2
    return late and len(likeness) > 1 and max(likeness[1:]) < likeness[0] + LEAST_GAIN


SYMPTOMS: Mapping[str, tuple[Callable[[Course], bool], str]] = {
    "diverges": (
        diverges,
        "The run diverges: the loss on the training pictures rises ({loss/fixed_noise}). Lower"
        " optimizer.learning_rate, or set optimizer.max_grad_norm.",
    ),
    "memorises": (
        memorises,
        "The run memorises its pictures: the loss rises on those held out ({loss/held_out}) and not"
        " on those it trains on. Take fewer steps, a lower adapter.rank or more pictures.",
    ),
    "collapses": (
        collapses,
        "The pictures collapse: those of different prompts are nearly the same"
        " ({fidelity/sameness}), and the prompts are followed less ({fidelity/clip_t}). Take fewer"
        " steps or a lower optimizer.learning_rate, and captions that say what differs from one"
        " picture to the next.",
    ),
    "leaks": (
        leaks,
        "The subject leaks into other prompts: their CLIP-T goes from {forgetting/others_clip_t},"
        " their likeness to the subject from {forgetting/others_clip_i}. {remedy}",
    ),
    "copies": (
        copies,
        "The pictures copy the training pictures: each is nearer to one of them"
        " ({fidelity/nearest_photo}) than they are to one another. Take fewer steps, a lower"
        " adapter.rank or more pictures.",
    ),
    "learns nothing": (
        learns_nothing,
        "Nothing is learnt so far: after half of the steps the likeness to the subject is the"
        " base's ({fidelity/clip_i}). Raise optimizer.learning_rate or adapter.rank, and check that"
        " the captions name the subject as validation.prompts do.",
    ),
}
"""The kinds of trouble: each with its test, and a sentence whose placeholders are the tags of
curves, and the remedy for leaking."""

REMEDIES: Mapping[str | None, str] = {
    None: "Add prior preservation (prior), or take fewer steps or a lower optimizer.learning_rate.",
    "pictures": "Raise prior.share or prior.weight, or try prior.kind: output.",
    "output": "Raise prior.share or prior.weight.",
}
"""The advice if the subject leaks, by the kind of prior preservation."""


def diagnose(history: Sequence[Validated], steps: int, prior: str | None = None) -> dict[str, str]:
    """Return a sentence for each thing that goes wrong now, by kind.

    Args:
        history: the validations so far, the base's first.
        steps: the steps that the run will have.
        prior: the kind of prior preservation; ``None``: none.
    """
    course = Course(history, steps)
    changes = defaultdict(lambda: "what was not measured", remedy=REMEDIES[prior])
    for tag in history[-1].figures:
        curve = course.curve(tag)
        changes[tag] = f"{curve[0]:.3f} to {curve[-1]:.3f}"
    return {
        kind: sentence.format_map(changes)
        for kind, (recognise, sentence) in SYMPTOMS.items()
        if recognise(course)
    }
