"""The scores of one run of a sweep, at each adapter scale.

They stand in ``scales/scores.json`` in the run's folder, with a variant for the base, one for each
scale, and the key of all that they depend on; the pictures are beside it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from adapters.atomic import write_png, write_text
from adapters.base.hub import STAGE_FOLDERS
from adapters.errors import UserError
from adapters.files.places import PEFT_WEIGHTS
from adapters.progress import Bar
from finetune.recipe.schema import Recipe
from finetune.sweeping.names import name_variant

if TYPE_CHECKING:
    from PIL import Image

    from adapters.cascade.results import Sample
    from finetune.evaluation.scoring import Scores

FORMAT = 1
"""The version of the file and of how its scores are made."""

BASE = "base"
"""The variant without adapters."""

Variant: TypeAlias = dict[str, dict[str, Any] | None]
"""Scores by name, such as ``clip_i``, each with its ``value``; ``None``: not defined."""

Drawn: TypeAlias = "tuple[list[Image.Image], list[bool]]"
"""Pictures in the order of the shots, and which of them the safety checker has blackened."""

FLAGGED = "flagged.json"
"""The file beside a variant's pictures that lists what the safety checker has blackened."""

FLAGS = TypeAdapter(list[bool])
"""The shape of that file."""


class Figure(TypedDict):
    """The part of a score that a scores file must have for it."""

    value: float | None


class ScoresFile(TypedDict):
    """The keys that a scores file must have."""

    key: str
    variants: dict[str, dict[str, Figure | None]]
    ceiling: dict[str, Figure | None]


SCORES = TypeAdapter(ScoresFile)
"""The shape of a scores file."""


def score_and_keep(recipe: Recipe, scales: Sequence[float]) -> None:
    """Score a trained run at the scales that its scores lack, and write them."""
    known = read_scores(recipe)
    if missing := [scale for scale in scales if name_variant(scale) not in known["variants"]]:
        found = score_point(recipe, missing)
        variants = known["variants"] | found["variants"]
        text = json.dumps(known | found | {"variants": variants}, indent=2)
        write_text(scores_file(recipe), f"{text}\n")


def score_point(recipe: Recipe, scales: Sequence[float]) -> dict[str, Any]:
    """Draw the evaluation's prompts with the base and at each scale, and score the pictures.

    The base's pictures are drawn once for all runs that are evaluated alike, and shown from the
    sweep's folder. This is the only place that knows how scores are made.

    Returns:
        The ``variants`` and the ``ceiling`` of the scores file.
    """
    from adapters.arguments import find_device
    from finetune.evaluation.drawing import Desk, list_shots
    from finetune.evaluation.measurement import Encoders, load_photos
    from finetune.evaluation.scoring import Yardstick
    from unets.memory import free_memory

    settings, device = recipe.evaluation, find_device("auto")
    assert settings is not None
    free_memory(device)  # the training's, in the same process
    encoders, shots = Encoders.load(settings, device), list_shots(settings)
    desk = Desk.of(recipe, settings, shots, device)
    yardstick = Yardstick(
        real=encoders.encode(load_photos(recipe), attrgetter("image"), "Scoring training pictures"),
        texts=encoders.clip.texts([shot.text for shot in shots]),
        shots=shots,
    )
    drawn = {}
    with Bar(total=(1 + len(scales)) * len(shots), desc="Drawing") as progress:
        folder = base_folder(recipe)
        if (base := read_drawn(folder, len(shots))) is None:
            base = keep_drawn(folder, desk.draw_base(progress))
        drawn[BASE] = base
        name = desk.cascade.add_adapter(recipe.folder / "adapters")
        for scale in scales:
            folder = pictures_folder(recipe, scale)
            drawn[name_variant(scale)] = keep_drawn(folder, desk.draw({name: scale}, progress))
    variants = {}
    for variant, (pictures, flagged) in drawn.items():
        vectors = encoders.encode(pictures, lambda picture: picture, f"Scoring {variant}")
        variants[variant] = _plain(yardstick.measure(vectors, flagged).scores)
    return {"variants": variants, "ceiling": _plain(yardstick.ceiling())}


def _plain(scores: "Scores") -> Variant:
    return {name: None if score is None else asdict(score) for name, score in scores.items()}


def keep_drawn(folder: Path, samples: "Sequence[Sample]") -> Drawn:
    """Write the pictures that a variant has drawn, in the order of the shots."""
    for file, sample in zip(list_files(folder, len(samples)), samples, strict=True):
        write_png(file, sample.final)
    flagged = [sample.flagged for sample in samples]
    write_text(folder / FLAGGED, json.dumps(flagged) + "\n")  # the last, so all are there
    return [sample.final for sample in samples], flagged


def read_drawn(folder: Path, count: int) -> "Drawn | None":
    """Read the pictures that a variant has drawn; ``None`` if they are not all there and whole."""
    from adapters.pictures.reading import read_picture

    try:
        flagged = FLAGS.validate_json((folder / FLAGGED).read_bytes(), strict=True)
        pictures = [read_picture(file) for file in list_files(folder, count)]
    except (OSError, ValidationError, UserError):
        return None
    return (pictures, flagged) if len(flagged) == count else None


def list_files(folder: Path, count: int) -> list[Path]:
    """List the files of the pictures drawn into a folder, in the order of the shots."""
    return [folder / f"{index:03d}.png" for index in range(count)]


def pictures_folder(recipe: Recipe, scale: float) -> Path:
    """Return the folder of the pictures drawn at a scale."""
    return recipe.folder / "scales" / name_variant(scale)


def scores_file(recipe: Recipe) -> Path:
    """Return the file of a run's scores."""
    return recipe.folder / "scales" / "scores.json"


def base_folder(recipe: Recipe) -> Path:
    """Return the folder of the base's pictures, in the sweep's folder."""
    return Path(recipe.runs_dir) / "base" / _digest(_select_drawing(recipe))[:16]


def read_scores(recipe: Recipe) -> dict[str, Any]:
    """Read a run's scores; without variants if there are none of these adapters and settings."""
    key = scores_key(recipe)
    try:
        scores: dict[str, Any] = json.loads(scores_file(recipe).read_text(encoding="utf-8"))
        known = SCORES.validate_python(scores, strict=True)
    except (OSError, ValueError):  # no file, no JSON, or of another shape
        known = None
    if known is not None and known["key"] == key and BASE in known["variants"]:
        return scores
    return {"format": FORMAT, "key": key, "variants": {}}


def scores_key(recipe: Recipe) -> str:
    """Hash all that a run's scores depend on.

    Raises:
        UserError: if the run has no adapters.
    """
    folder = recipe.folder / "adapters"
    files = [folder / name / PEFT_WEIGHTS for name in STAGE_FOLDERS]
    found = {file.parent.name: file.read_bytes() for file in files if file.exists()}
    if not found:
        raise UserError(f"There are no adapters in {folder}: train the recipe first.")
    adapters = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    data = recipe.data.model_dump(mode="json")
    return _digest([FORMAT, _select_drawing(recipe), data, adapters])


def _select_drawing(recipe: Recipe) -> Any:
    """Select from a recipe all that the base's pictures depend on."""
    assert recipe.evaluation is not None
    precisions = {stage.name: recipe.training(stage).precision for stage in recipe.trained}
    return [
        precisions,
        recipe.evaluation.model_dump(mode="json", exclude={"expected"}),
        recipe.validation.sampling.model_dump(mode="json"),
        recipe.base.model_dump(mode="json"),
        recipe.text.model_dump(mode="json"),
    ]


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()
