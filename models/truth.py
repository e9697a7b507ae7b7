"""Score a run of the embedded cascade beside what is true of its world.

    python -m models.truth recipes/quickstart.yaml
    python -m models.truth recipes/quickstart.yaml --pictures drawn --json truth.json

Two things are known of this world alone. One is the most that a CLIP score can reach: the score of
true renders of the same captions. The other is the shape that each object should have, about which
the small CLIP is lenient: the SSIM of the real sprite within its outline (`models/shape.py`) is
shown beside what the base reaches on objects that it was trained on.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeAlias

from adapters.atomic import check_out, write_text
from adapters.errors import UserError, command_line, quiet_libraries
from adapters.tables import format_table
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Data, Evaluation, Recipe
from finetune.step.stages import STAGES
from models.world import BACKGROUNDS, SEEN, caption, parse_caption

if TYPE_CHECKING:
    from PIL import Image

    from adapters import Cascade
    from finetune.evaluation.metrics import ClipScorer

OWN = SEEN[::12]
"""Objects of all classes that the base was trained on: indices into `world.THINGS`."""
OTHERS = ("pizza",)
"""The objects of the shipped recipes' other prompts that are not in `OWN`."""
DRAWS = 8
"""The number of true renders of each caption."""
PICTURE_PX = 128
"""The size of the embedded cascade's pictures."""

Scores: TypeAlias = dict[str, float]
"""Scores by their names in `ROWS`; those of other prompts only if there are some."""

ROWS: Mapping[str, tuple[str, str]] = {
    "clip_i": ("CLIP-I, generated to real pictures", "true"),
    "clip_t": ("CLIP-T, picture to prompt", "true"),
    "clip_t_others": ("CLIP-T, prompts of other things", "base"),
    "shape": ("SSIM within the sprite's outline", "own"),
    "shape_others": ("SSIM, prompts of other things", "base"),
}
"""Each score's title, and the column that the fine-tuned cascade's score is a share of."""
COLUMNS: Mapping[str, str] = {
    "base": "base",
    "fine_tuned": "fine-tuned",
    "own": "base, own objects",
    "true": "true renders",
}
"""The columns of the table."""


def render_true(
    captions: Sequence[str], count: int, seed: int, size_px: int = PICTURE_PX
) -> "list[Image.Image]":
    """Draw captions with the world's own renderer: `count` pictures of each, one after another.

    Places are random, and so is the background of a caption that names none.

    Args:
        captions: captions of this world, without an identifier.
        count: the number of pictures of each.
        seed: the seed of places and backgrounds.
        size_px: the picture size.

    Raises:
        UserError: if a caption is not of this world, or its object's sprite is not stored.
    """
    import torch

    from models.scenes import draw_scenes, read_sprites

    scenes = [parse_caption(text) for text in captions for _ in range(count)]
    chance = torch.Generator().manual_seed(seed)
    backgrounds = torch.randint(len(BACKGROUNDS), (len(scenes),), generator=chance)
    for index, (_, named) in enumerate(scenes):
        if named is not None:
            backgrounds[index] = named
    return draw_scenes(read_sprites([thing for thing, _ in scenes]), backgrounds, size_px, seed)


def score_shapes(pictures: "Sequence[Image.Image]", captions: Sequence[str]) -> list[float]:
    """Compute the SSIM of each picture with the sprite of the object that its caption names.

    Raises:
        UserError: if a caption is not of this world, or its object's sprite is not stored.
    """
    from models.scenes import read_sprites
    from models.shape import shape_score

    sprites = read_sprites([parse_caption(text)[0] for text in captions])
    return [
        shape_score([picture], sprite)[0] for picture, sprite in zip(pictures, sprites, strict=True)
    ]


def score(
    pictures: "Sequence[Image.Image]",
    captions: Sequence[str],
    subject: str,
    photos: "Sequence[Image.Image]",
    scorer: "ClipScorer",
) -> Scores:
    """Score pictures of the subject and of other things.

    Args:
        pictures: the pictures, drawn by a cascade or true.
        captions: the caption of each, without an identifier.
        subject: the subject's name; pictures whose captions name another object are the others.
        photos: real pictures of the subject.
        scorer: the CLIP model.

    Raises:
        UserError: if no caption names the subject.
    """
    from finetune.evaluation.metrics import clip_i, clip_t

    mine, shapes = find_subject(captions, subject), score_shapes(pictures, captions)
    others = [i for i in range(len(captions)) if i not in mine]
    seen, read = scorer.images(pictures), scorer.texts(captions)
    scores = {
        "clip_i": clip_i(seen[mine], scorer.images(photos)),
        "clip_t": clip_t(seen[mine], read[mine]),
        "shape": fmean(shapes[i] for i in mine),
    }
    if others:
        scores["clip_t_others"] = clip_t(seen[others], read[others])
        scores["shape_others"] = fmean(shapes[i] for i in others)
    return scores


def find_subject(captions: Sequence[str], subject: str) -> list[int]:
    """Find the places of the captions that name the subject.

    Raises:
        UserError: if none does, or a caption is not of this world.
    """
    thing, _ = parse_caption(subject)
    mine = [i for i, text in enumerate(captions) if parse_caption(text)[0] == thing]
    if not mine:
        raise UserError(f"No picture is of {subject!r}, the subject: draw some of its prompts.")
    return mine


def measure(
    recipe: Recipe, folder: Path | None = None, images_per_prompt: int = 1
) -> dict[str, Scores]:
    """Score the base, the fine-tuned cascade and true renders.

    Args:
        recipe: a recipe of the embedded cascade with an `evaluation` section.
        folder: captioned pictures to score, a dataset's or of `adapters.generate`; `None`: those
            that the run's adapters draw of the evaluation's prompts.
        images_per_prompt: the number of pictures drawn of each prompt, 1 or more.

    Returns:
        The scores by column of `COLUMNS`. `own` has only `shape`, of the base's pictures of `OWN`
        on the captions' backgrounds.

    Raises:
        UserError: before anything is drawn, if there is no `evaluation` section, no adapter or no
            picture, a prompt is not of this world, none names the subject, or no picture of each
            is asked for.
    """
    from adapters import load_cascade
    from finetune.evaluation.metrics import ClipScorer
    from finetune.run.folders import Folders

    settings, adapters = recipe.evaluation, Folders(recipe.folder).adapters
    if settings is None:
        raise UserError("The recipe needs an evaluation section: prompts, subject and clip.")
    if images_per_prompt < 1:
        raise UserError(f"--images-per-prompt must be 1 or more (got {images_per_prompt}).")
    if folder is None and not adapters.is_dir():
        raise UserError(f"There are no adapters in {adapters}: train the recipe first.")
    size_px = recipe.source(STAGES[2 if recipe.base.stage_2 else 1]).picture_size_px
    given, given_prompts = ([], []) if folder is None else read_drawn(folder, recipe.cache, size_px)
    prompts = list(dict.fromkeys(given_prompts)) or [*settings.prompts, *settings.other_prompts]
    captions = _to_captions(prompts, settings)
    find_subject(captions, settings.subject)
    true = render_true(captions, DRAWS, settings.seed, size_px)  # finds mistakes in captions
    photos, _ = read_captioned(recipe.data, recipe.cache, size_px)
    scorer = ClipScorer(settings.clip)

    places = [place or 0 for _, place in map(parse_caption, captions)]
    own = [caption(thing, place) for thing, place in zip(OWN, cycle(places), strict=False)]
    cascade = load_cascade(
        recipe.base.stage_1,
        recipe.base.stage_2,
        revision=recipe.base.revision,
        variant=recipe.base.variant,
    )
    own_drawn = draw(cascade, recipe, settings, own, 1)
    base = draw(cascade, recipe, settings, prompts, images_per_prompt)
    if folder is None:
        cascade.add_adapter(adapters)
        given = draw(cascade, recipe, settings, prompts, images_per_prompt)
        given_prompts = _repeat(prompts, images_per_prompt)

    def rate(pictures: "Sequence[Image.Image]", captions: Sequence[str]) -> Scores:
        return score(pictures, captions, settings.subject, photos, scorer)

    return {
        "base": rate(base, _repeat(captions, images_per_prompt)),
        "fine_tuned": rate(given, _to_captions(given_prompts, settings)),
        "own": {"shape": fmean(score_shapes(own_drawn, own))},
        "true": rate(true, _repeat(captions, DRAWS)),
    }


def _to_captions(prompts: Sequence[str], settings: Evaluation) -> list[str]:
    """Replace the identifier by the subject's name, as the text score does."""
    return [prompt.replace(settings.identifier, settings.subject) for prompt in prompts]


def _repeat(texts: Sequence[str], count: int) -> list[str]:
    return [text for text in texts for _ in range(count)]


def draw(
    cascade: "Cascade",
    recipe: Recipe,
    settings: Evaluation,
    prompts: Sequence[str],
    images_per_prompt: int,
) -> "list[Image.Image]":
    """Draw prompts as the evaluation does: its seed, its sampling, its prompts of Stage II."""
    stage_2 = dict(zip(settings.prompts, settings.stage_2_prompts or settings.prompts, strict=True))
    images = cascade(
        prompts,
        stage_2_prompt=[stage_2.get(prompt, prompt) for prompt in prompts],
        images_per_prompt=images_per_prompt,
        seed=settings.seed,
        sampling=settings.sampling or recipe.validation.sampling,
        clean_caption=recipe.text.clean_caption,
    )
    return list(images.final)


def read_drawn(folder: Path, cache: Path, size_px: int) -> "tuple[list[Image.Image], list[str]]":
    """Read a folder's pictures and prompts: its captions, or else the records in saved pictures.

    Raises:
        UserError: if the folder has no pictures, or they have no prompts.
    """
    from PIL import Image

    from adapters import read_picture_info
    from adapters.cascade.results import SHEET
    from finetune.data.sources import has_captions

    if has_captions(folder):
        return read_captioned(Data(source=str(folder)), cache, size_px)
    records = {
        file: read_picture_info(file) for file in sorted(folder.glob("*.png")) if file.name != SHEET
    }
    if not records:
        raise UserError(f"There are no pictures in {folder}: name a folder of captioned ones.")
    last = max(info.stage for info in records.values())
    kept = {file: info for file, info in records.items() if info.stage == last}
    return [Image.open(file) for file in kept], [info.prompts[1] for info in kept.values()]


def read_captioned(data: Data, cache: Path, size_px: int) -> "tuple[list[Image.Image], list[str]]":
    """Read a dataset's pictures, cropped to squares, and their captions."""
    import numpy as np

    from finetune.data.pictures import crop, load_pictures

    read, rng = load_pictures(data, cache, size_px), np.random.default_rng(0)
    squares = [
        crop(picture, size_px, rng, center_shift=0.0, horizontal_flip=False) for picture in read
    ]
    return squares, [picture.caption for picture in read]


def compute_shares(scores: Mapping[str, Scores]) -> Scores:
    """Divide the fine-tuned cascade's scores by those that `ROWS` compares them with."""
    return {
        name: found / scores[column][name]
        for name, found in scores["fine_tuned"].items()
        for _, column in (ROWS[name],)
    }


def tabulate(scores: Mapping[str, Scores]) -> str:
    """Lay the scores of all columns out as a table, with the shares."""
    shares = compute_shares(scores)
    rows = [
        (
            title,
            *(f"{scores[key][name]:.3f}" if name in scores[key] else "" for key in COLUMNS),
            f"{shares[name]:.0%} of {COLUMNS[column]}",
        )
        for name, (title, column) in ROWS.items()
        if name in shares
    ]
    return format_table([("", *COLUMNS.values(), "share"), *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m models.truth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, such as recipes/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the recipe's"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="score these instead of the run's"
    )
    parser.add_argument(
        "--images-per-prompt", type=int, default=1, metavar="N", help="(default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores here")
    options = parser.parse_intermixed_args(arguments)
    with command_line():
        recipe = load_recipe(options.recipe, options.overrides)
        if options.json is not None:
            check_out(options.json, "file")
        quiet_libraries()
        scores = measure(recipe, options.pictures, options.images_per_prompt)
        if options.json is not None:
            everything = scores | {"share": compute_shares(scores)}
            write_text(options.json, json.dumps(everything, indent=2) + "\n")
        sys.stdout.write(f"{tabulate(scores)}\n")


if __name__ == "__main__":
    main()
