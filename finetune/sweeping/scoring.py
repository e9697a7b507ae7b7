"""The scores of one run of a sweep, at each adapter scale.

They stand in ``scales/scores.json`` in the run's folder, with a variant for the base, one for each
scale, and the key of all that they depend on; the pictures are beside it.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from filelock import FileLock

from adapters.atomic import write_png, write_text
from adapters.base.hub import STAGE_FOLDERS
from adapters.errors import UserError
from adapters.files.places import PEFT_WEIGHTS
from finetune.recipe.schema import Recipe

if TYPE_CHECKING:
    from PIL import Image

FORMAT = 1
"""The version of the file and of how its scores are made."""

BASE = "base"
"""The variant without adapters."""

Variant: TypeAlias = dict[str, dict[str, float | None]]
"""Scores by name, such as ``clip_i``, each with its ``value``; ``None``: not defined."""


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

    This is the only place that knows how scores are made.

    Returns:
        The ``variants`` and the ``ceiling`` of the scores file.
    """
    import numpy as np

    from finetune.data.pictures import crop, load_pictures
    from finetune.evaluation.comparison import score

    assert recipe.evaluation is not None
    base, drawn = draw(recipe, scales)
    size_px, rng = base[0].width, np.random.default_rng(0)
    photos = [
        crop(picture, size_px, rng, center_shift=0.0, horizontal_flip=False)
        for picture in load_pictures(recipe.data, recipe.cache, size_px)
    ]
    variants: dict[str, Variant] = {}
    ceiling: Variant = {}
    for name, pictures in drawn.items():
        places = {
            "base": variants.setdefault(BASE, {}),
            "fine_tuned": variants.setdefault(name, {}),
            "real_to_real": ceiling,
        }
        for key, value in score(recipe.evaluation, photos, base, pictures).items():
            metric, _, cascade = key.partition("/")
            places[cascade][metric] = {"value": value}
    return {"variants": variants, "ceiling": ceiling}


def draw(
    recipe: Recipe, scales: Sequence[float]
) -> tuple[list["Image.Image"], dict[str, list["Image.Image"]]]:
    """Draw the last stage's picture of each prompt, and keep all of them.

    The base's pictures are drawn once for all runs of the sweep that are evaluated alike.

    Returns:
        The pictures of the base, and those of each variant by name, in the order of the prompts.
    """
    import torch

    from adapters import load_cascade
    from adapters.cascade.load import Parts
    from finetune.data.captions import CaptionCache, collect_prompts, embed_captions
    from unets.memory import free_memory

    settings = recipe.evaluation
    assert settings is not None
    prompts, own = settings.prompts + settings.other_prompts, settings.stage_2_prompts
    stage_2_prompts = None if own is None else own + settings.other_prompts
    written = collect_prompts(recipe)
    captions = {text: written[text] for text in [*prompts, *(own or ()), ""]}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embeds = embed_captions(captions, CaptionCache.of(recipe, device))
    free_memory(device)  # the training's, in the same process
    base = recipe.base
    cascade = load_cascade(
        base.stage_1,
        base.stage_2,
        base.stage_3,
        revision=base.revision,
        variant=base.variant,
        parts=Parts(text_encoder=False),
    )

    def draw_into(folder: Path) -> list["Image.Image"]:
        pictures = cascade(
            prompts,
            stage_2_prompt=stage_2_prompts,
            embeds=embeds,
            seed=settings.seed,
            sampling=settings.sampling or recipe.validation.sampling,
        ).final
        for file, picture in zip(list_files(folder, len(prompts)), pictures, strict=True):
            write_png(file, picture)
        return list(pictures)

    folder = base_folder(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # runs scored at once draw the base's pictures once
        base_pictures = read_pictures(folder, len(prompts)) or draw_into(folder)
    name = cascade.add_adapter(recipe.folder / "adapters")
    drawn = {}
    for scale in scales:
        cascade.set_adapters({name: scale})
        drawn[name_variant(scale)] = draw_into(pictures_folder(recipe, scale))
    return base_pictures, drawn


def read_pictures(folder: Path, count: int) -> list["Image.Image"]:
    """Read the pictures drawn into a folder; none if any is missing."""
    from adapters.pictures.reading import read_picture

    files = list_files(folder, count)
    return [read_picture(file) for file in files] if all(f.exists() for f in files) else []


def list_files(folder: Path, count: int) -> list[Path]:
    """List the files of the pictures drawn into a folder, in the order of the prompts."""
    return [folder / f"{index:02d}.png" for index in range(count)]


def name_variant(scale: float) -> str:
    """Name the variant of an adapter scale."""
    return f"{scale:.6g}"


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
    except (OSError, ValueError):
        scores = {}
    return scores if scores.get("key") == key else {"format": FORMAT, "key": key, "variants": {}}


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
    return [
        recipe.evaluation.model_dump(mode="json", exclude={"expected"}),
        recipe.validation.sampling.model_dump(mode="json"),
        recipe.base.model_dump(mode="json"),
        recipe.text.model_dump(mode="json"),
    ]


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()
