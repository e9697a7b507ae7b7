"""The result of an evaluation: scores, pictures, and the files that show both."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from adapters.atomic import replace_folder, write_text, writing_to
from adapters.cascade.results import Sample, picture_name
from adapters.errors import UserError
from adapters.tables import format_table
from finetune.evaluation.drawing import Shot
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

SCORES, PAGE, PICTURES = "scores.json", "report.html", "pictures"

CEILING = "real pictures among themselves"

VARIANTS = {
    "base": "base",
    "fine_tuned": "fine-tuned",
    "stage_1": "Stage I alone",
    "stage_2": "Stage II alone",
}
"""The variants' titles, in their order."""


@dataclass(frozen=True)
class Photo:
    """A training picture as it was compared."""

    source: str
    """Its origin: a path, or dataset and row."""
    picture: Image.Image


@dataclass(frozen=True)
class EvaluationReport:
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
            intervals: show their confidence intervals.
        """
        columns = [*self.variants.values(), self.ceiling]
        titles = [VARIANTS[name] for name in self.variants]
        lines = []
        for name in names:
            if any(scores.get(name) for scores in self.variants.values()):
                cells = [_format(scores, name, intervals=intervals) for scores in columns]
                lines.append((self.title(name), *cells))
        return format_table([("", *titles, "ceiling"), *lines])

    def as_json(self) -> dict[str, Any]:
        """Return all figures, as ``scores.json`` holds them; undefined ones are ``None``."""
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

    def save(self, folder: str | Path) -> Path:
        """Write the pictures, ``scores.json`` and ``report.html``; return the path of the report.

        Args:
            folder: a new folder, or that of an earlier evaluation, which is replaced as a whole.

        Raises:
            UserError: if something else is in the folder, or it cannot be written.
        """
        from finetune.evaluation.page import write_page

        folder = Path(folder)
        check_folder(folder)
        with writing_to(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as temporary:
                new = Path(temporary) / "new"
                for variant, samples in self.samples.items():
                    for file, sample in zip(self.files(variant), samples, strict=True):
                        sample.save(new / PICTURES / file)
                text = json.dumps(self.as_json(), indent=2, allow_nan=False, ensure_ascii=False)
                write_text(new / SCORES, text + "\n")
                write_text(new / PAGE, write_page(self))
                replace_folder(new, folder)
        return folder / PAGE


def check_folder(folder: Path) -> None:
    """Raise a UserError if a folder holds something other than an earlier evaluation."""
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / SCORES).is_file():
        raise UserError(
            f"{folder} is there already and is no earlier evaluation, so it stays as it is; name a"
            " new folder."
        )


def _format(scores: Scores, name: str, *, intervals: bool) -> str:
    if name not in scores:
        return ""
    score = scores[name]
    if score is None:
        return "-"
    return str(score) if intervals else f"{score.value:.3f}"


def _plain(scores: Scores) -> dict[str, Any]:
    return {name: None if score is None else asdict(score) for name, score in scores.items()}
