"""The result of an evaluation: scores and pictures, as a table and as JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

import numpy as np
from PIL import Image

from adapters.cascade.results import Sample, picture_name
from adapters.tables import format_table
from finetune.data.pictures import Picture, crop
from finetune.evaluation.drawing import Group, Shot
from finetune.evaluation.intervals import CONFIDENCE
from finetune.evaluation.scoring import (
    BY_JUDGE,
    ENCODERS,
    TITLES,
    PictureScore,
    Scores,
    choose_judge,
)

FORMAT = 1
"""The version of the JSON's layout."""

PICTURES = "pictures"
"""The folder of the pictures' files."""

TITLE_WIDTH = 20
"""The width of scores' titles in a table with intervals, which fits a terminal of 100 columns."""

CEILING = "real pictures"
"""The title of the training pictures' scores among themselves."""

VARIANTS = {
    "base": "base",
    "fine_tuned": "fine-tuned",
    "stage_1": "Stage I alone",
    "stage_2": "Stage II alone",
}
"""The variants' titles, in their order."""


ONLY_PROMPT: Mapping[Group, str] = {
    "subject": "with the subject",
    "others": "without the subject",
    "class": "of the subject's class",
}
"""The name of the single prompt of a group."""


@dataclass(frozen=True)
class Photo:
    """A training picture, as it is compared: cropped at its centre."""

    picture: Picture
    size_px: int

    @property
    def source(self) -> str:
        """Its origin: a path, or dataset and row."""
        return self.picture.source

    @property
    def image(self) -> Image.Image:
        """The crop, read from the cache each time, as there may be thousands."""
        rng = np.random.default_rng(0)
        return crop(self.picture, self.size_px, rng, center_shift=0.0, horizontal_flip=False)


@dataclass(frozen=True)
class Results:
    """Scores and pictures of the variants of a cascade, all drawn from the same seeds."""

    recipe: str
    """The recipe's name."""
    encoders: Mapping[str, str]
    """The models that scored, by ``clip`` and ``dino``."""
    adapters: Mapping[str, Any]
    """The adapters of the fine-tuned cascade, each with its scale."""
    variants: Mapping[str, Scores]
    """The scores of each variant: ``base``, ``fine_tuned``, ``stage_1``, ``stage_2``."""
    changes: Mapping[str, Scores]
    """The changes from the base, by variant; their intervals are of pairs with the same seed."""
    ceiling: Scores
    """The scores of the training pictures among themselves."""
    shots: Sequence[Shot]
    samples: Mapping[str, Sequence[Sample]]
    """The pictures of all shots, by variant."""
    picture_scores: Mapping[str, Sequence[PictureScore]]
    """Their own scores."""
    photos: Sequence[Photo]
    """The training pictures."""
    reference: str | None = None
    """The folder of the Fréchet distance; ``None``: none."""

    def title(self, name: str) -> str:
        """Return a score's title, with the encoder where the recipe decides on it."""
        by = f" ({ENCODERS[choose_judge(self.encoders)]})"
        return TITLES[name] + by * (name in BY_JUDGE)

    def table(self, names: Sequence[str] = tuple(TITLES), *, intervals: bool = True) -> str:
        """Lay the scores out as a table, those that are defined for some variant.

        Args:
            names: the scores to show.
            intervals: show their confidence intervals, below them.
        """
        columns = [*self.variants.values(), self.ceiling]
        titles = [VARIANTS[name] for name in self.variants]
        lines = []
        for name in names:
            if any(scores.get(name) for scores in self.variants.values()):
                cells = [_format(scores, name, intervals=intervals) for scores in columns]
                title = self.title(name)
                lines.append((fill(title, TITLE_WIDTH) if intervals else title, *cells))
        return format_table([("", *titles, CEILING), *lines])

    def explain_intervals(self) -> str:
        """Say in a sentence what the intervals are of."""
        prompts = {(shot.group, shot.place) for shot in self.shots}
        counts = Counter(group for group, _ in prompts)
        alone = [title for group, title in ONLY_PROMPT.items() if counts[group] == 1]
        by_picture = f", or the pictures where there is only one prompt ({', '.join(alone)})"
        return (
            f"Intervals hold {100 * CONFIDENCE:.0f} % of the means that resampling the prompts"
            f" gives{by_picture * bool(alone)}; of few they say little."
        )

    def as_json(self) -> dict[str, Any]:
        """Return all figures, as the saved file holds them; undefined ones are ``None``."""
        return {
            "format": FORMAT,
            "recipe": self.recipe,
            "encoders": dict(self.encoders),
            "adapters": dict(self.adapters),
            "reference": self.reference,
            "variants": {name: _plain(scores) for name, scores in self.variants.items()},
            "changes": {name: _plain(scores) for name, scores in self.changes.items()},
            "ceiling": _plain(self.ceiling),
            "pictures": [
                {
                    "file": f"{PICTURES}/{file}",
                    "variant": variant,
                    "group": shot.group,
                    "prompt": shot.prompt,
                    "seed": shot.seed,
                    "flagged": sample.flagged,
                    "clip_t": score.clip_t,
                    "likeness": score.likeness,
                    "nearest": self.photos[score.nearest].source,
                    "similarity": score.similarity,
                }
                for variant, samples in self.samples.items()
                for file, shot, sample, score in zip(
                    self.files(variant),
                    self.shots,
                    samples,
                    self.picture_scores[variant],
                    strict=True,
                )
            ],
        }

    def files(self, variant: str) -> list[str]:
        """Name the file of each shot's picture, below the folder of pictures."""
        return [
            f"{variant}/{picture_name(number, shot.prompt, shot.seed)}.png"
            for number, shot in enumerate(self.shots)
        ]


def _format(scores: Scores, name: str, *, intervals: bool) -> str:
    if name not in scores:
        return ""
    score = scores[name]
    if score is None:
        return "-"
    interval = "" if score.low is None else f"\n{score.low:.3f} to {score.high:.3f}"
    return f"{score.value:.3f}{interval * intervals}"


def _plain(scores: Scores) -> dict[str, Any]:
    return {name: None if score is None else asdict(score) for name, score in scores.items()}
