"""The evaluation of a run: what its adapters have learnt, copied and forgotten."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from adapters.arguments import find_device
from adapters.errors import UserError
from adapters.pictures.reading import picture_suffixes, read_picture
from finetune.data.captions import check_cleaning, collect_prompts
from finetune.data.pictures import load_pictures
from finetune.evaluation.drawing import Adapters, check_adapters, draw_variants, list_shots
from finetune.evaluation.encoders import (
    ClipScorer,
    DinoScorer,
    PictureEncoder,
    encode_pictures,
)
from finetune.evaluation.report import EvaluationReport
from finetune.evaluation.results import Photo
from finetune.evaluation.scoring import Vectors, Yardstick, changes
from finetune.recipe.schema import Evaluation, Recipe
from finetune.run.folders import Folders
from finetune.step.stages import STAGES

Holder = TypeVar("Holder")


def evaluate(
    recipe: Recipe,
    adapters: Adapters | None = None,
    *,
    apart: bool = False,
    reference: str | Path | None = None,
) -> EvaluationReport:
    """Draw the recipe's ``evaluation`` prompts with the base and with adapters, and score both.

    Mistakes are found before anything is drawn.

    Args:
        recipe: a recipe with an ``evaluation`` section.
        adapters: the adapters to evaluate, together, each with its scale; empty: the base alone;
            ``None``: those that the recipe's run has exported.
        apart: evaluate each stage's adapters alone as well.
        reference: a folder of pictures for the Fréchet distance; ``None``: not computed.

    Raises:
        UserError: if the recipe has no such section, or an adapter, a model, a training picture or
            the reference is missing or damaged.
    """
    settings = recipe.evaluation
    if settings is None:
        raise UserError(
            "The recipe needs an `evaluation` section: identifier, subject and prompts."
        )
    check_cleaning(collect_prompts(recipe), clean_caption=recipe.text.clean_caption)
    adapters = own_adapters(recipe) if adapters is None else adapters
    check_adapters(adapters)
    files = [] if reference is None else find_pictures(Path(reference))
    device = find_device("auto")
    encoders = Encoders.load(settings, device)
    photos = load_photos(recipe)
    shots = list_shots(settings)
    yardstick = Yardstick(
        real=encoders.encode(photos, attrgetter("image"), "Scoring training pictures"),
        texts=encoders.clip.texts([shot.text for shot in shots]),
        shots=shots,
        reference=encoders.encode_reference(files) if files else None,
    )  # reads all pictures, so that a damaged one is found before any is drawn
    samples = draw_variants(recipe, settings, shots, adapters, device, apart=apart)
    measured = {
        name: yardstick.measure(
            encoders.encode(drawn, attrgetter("final"), f"Scoring {name}"),
            [each.flagged for each in drawn],
        )
        for name, drawn in samples.items()
    }
    return EvaluationReport(
        recipe=recipe.name,
        encoders=encoders.names,
        adapters=adapters,
        variants={name: variant.scores for name, variant in measured.items()},
        changes=changes(measured),
        ceiling=yardstick.ceiling(),
        shots=shots,
        samples=samples,
        picture_scores={name: variant.pictures for name, variant in measured.items()},
        photos=photos,
        reference=None if reference is None else str(reference),
    )


@dataclass(frozen=True)
class Encoders:
    """The models that score."""

    names: dict[str, str]
    """Their folders or hub names, by ``clip`` and ``dino``."""
    clip: ClipScorer
    dino: DinoScorer | None

    @classmethod
    def load(cls, settings: Evaluation, device: torch.device) -> "Encoders":
        """Load the models that a recipe names."""
        names = {"clip": settings.clip} | ({"dino": settings.dino} if settings.dino else {})
        dino = DinoScorer(settings.dino, device) if settings.dino else None
        return cls(names, ClipScorer(settings.clip, device), dino)

    @cached_property
    def _all(self) -> dict[str, PictureEncoder]:
        return {"clip": self.clip} | ({} if self.dino is None else {"dino": self.dino})

    def encode(
        self, holders: Sequence[Holder], take: Callable[[Holder], Image.Image], title: str
    ) -> Vectors:
        """Compute by each model the vectors of pictures, each taken out when its turn comes."""
        return {
            name: encode_pictures(encoder, map(take, holders), len(holders), title)
            for name, encoder in self._all.items()
        }

    def encode_reference(self, files: Sequence[Path]) -> torch.Tensor:
        """Compute CLIP's vectors of picture files, of which only a batch is held at a time."""
        pictures = map(read_picture, files)
        return encode_pictures(self.clip, pictures, len(files), "Scoring the reference")


def own_adapters(recipe: Recipe) -> Adapters:
    """Return the adapters that a recipe's run has exported.

    Raises:
        UserError: if it has not.
    """
    folder = Folders(recipe.folder).adapters
    if not folder.is_dir():
        raise UserError(f"There are no adapters in {folder}: train the recipe first.")
    return {str(folder): 1.0}


def load_photos(recipe: Recipe) -> list[Photo]:
    """Load the training pictures, to be cropped to the size that the cascade draws."""
    last = STAGES[2 if recipe.base.stage_2 else 1]
    size_px = recipe.source(last).picture_size_px
    pictures = load_pictures(recipe.data, recipe.cache, size_px)
    return [Photo(picture, size_px) for picture in pictures]


def find_pictures(folder: Path) -> list[Path]:
    """List the picture files in a folder and in folders inside it, sorted.

    Raises:
        UserError: if it is no folder, or has fewer than two, from which no covariance can be
            computed.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise UserError(f"--reference must be a folder of pictures, but {folder} is {found}.")
    paths = [path for path in folder.rglob("*") if not path.name.startswith(".")]
    files = sorted(path for path in paths if path.suffix.lower() in picture_suffixes())
    if len(files) < 2:
        raise UserError(
            f"--reference must be a folder with two pictures or more, but {folder} has"
            f" {len(files)}; name another."
        )
    return files
