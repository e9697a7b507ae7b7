"""The base beside the fine-tuned cascade: one picture to look at, and its CLIP scores.

python -m finetune.compare RECIPE [key=value …]
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from adapters import load_cascade
from adapters.atomic import write_text
from adapters.cascade.load import Parts
from adapters.cascade.results import CascadeImages
from adapters.errors import UserError
from adapters.pictures.contact_sheet import contact_sheet
from finetune.data.captions import CaptionCache, collect_prompts, embed_captions
from finetune.data.pictures import crop, load_pictures
from finetune.evaluation.metrics import ClipScorer, clip_i, clip_i_ceiling, clip_t
from finetune.recipe.schema import Comparison, Expected, Recipe
from finetune.run.folders import Folders
from finetune.step.stages import STAGES

Scores: TypeAlias = dict[str, float | None]
"""Scores by name and by what they are of, such as ``clip_i/base``; ``None``: not defined."""

TITLES = {
    "clip_i": "CLIP-I, generated to real pictures",
    "clip_t": "CLIP-T, picture to prompt",
    "clip_t_others": "CLIP-T, prompts of other things",
}

FAR = 3
"""A score so many spreads below what is expected is no chance: something is broken."""


def compare(recipe: Recipe) -> tuple[str, Scores]:
    """Write ``before_after.png`` and ``.json`` into the run's folder; a table to print and scores.

    Raises:
        UserError: where the recipe has no ``comparison`` section, or the run no adapters.
    """
    comparison, folders = recipe.comparison, Folders(recipe.folder)
    if comparison is None:
        raise UserError("The recipe needs a `comparison` section: prompts, subject and clip.")
    if not folders.adapters.is_dir():
        raise UserError(f"There are no adapters in {folders.adapters}: train the recipe first.")
    prompts = comparison.prompts + comparison.other_prompts
    before, after = sample_both(recipe, comparison, prompts, folders.adapters)
    photos = real_pictures(recipe)
    columns = len(prompts)
    sheet = contact_sheet(
        [photos[:columns], list(before), list(after)],
        row_captions=["your pictures", "before", "after"],
        column_captions=prompts,
        title=f"{recipe.name}: what the cascade knew, and what it has learned",
    )
    scores = score(comparison, photos, before, after)
    picture = folders.run / "before_after.png"
    sheet.save(picture)
    write_text(folders.run / "before_after.json", json.dumps(scores, indent=2) + "\n")
    return table(scores, picture, folders), scores


def sample_both(
    recipe: Recipe, comparison: Comparison, prompts: Sequence[str], adapters: Path
) -> tuple[Sequence[Image.Image], Sequence[Image.Image]]:
    """The final stage's pictures of each prompt, of the base and with the adapters merged."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = comparison.stage_2_prompts
    stage_2_prompts = None if own is None else own + comparison.other_prompts
    written = collect_prompts(recipe)
    captions = {text: written[text] for text in [*prompts, *(own or ()), ""]}
    embeds = embed_captions(captions, CaptionCache.of(recipe, device))
    cascade = load_cascade(
        recipe.base.stage_1,
        recipe.base.stage_2,
        recipe.base.stage_3,
        revision=recipe.base.revision,
        variant=recipe.base.variant,
        parts=Parts(text_encoder=False),
    )

    def sample() -> CascadeImages:
        return cascade(
            prompts,
            stage_2_prompt=stage_2_prompts,
            embeds=embeds,
            seed=comparison.seed,
            sampling=comparison.sampling or recipe.validation.sampling,
        )

    before = sample()
    cascade.add_adapter(adapters)
    return before.final, sample().final


def real_pictures(recipe: Recipe) -> list[Image.Image]:
    """The recipe's own pictures, cropped at their centre to the size of the last stage."""
    last = STAGES[2 if recipe.base.stage_2 else 1]
    size_px = recipe.source(last).picture_size_px
    pictures = load_pictures(recipe.data, recipe.cache, size_px)
    rng = np.random.default_rng(0)
    return [crop(p, size_px, rng, center_shift=0.0, horizontal_flip=False) for p in pictures]


def score(
    comparison: Comparison,
    photos: Sequence[Image.Image],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
) -> Scores:
    """CLIP-I and CLIP-T of the subject's prompts and of the others, base and fine-tuned."""
    scorer = ClipScorer(comparison.clip)
    real, subjects = scorer.images(photos), len(comparison.prompts)
    texts = scorer.texts(
        [
            prompt.replace(comparison.identifier, comparison.subject)
            for prompt in comparison.prompts + comparison.other_prompts
        ]
    )
    scores: Scores = {"clip_i/real_to_real": clip_i_ceiling(real)}
    for name, pictures in (("base", before), ("fine_tuned", after)):
        vectors = scorer.images(pictures)
        scores[f"clip_i/{name}"] = clip_i(vectors[:subjects], real)
        scores[f"clip_t/{name}"] = clip_t(vectors[:subjects], texts[:subjects])
        if comparison.other_prompts:
            scores[f"clip_t_others/{name}"] = clip_t(vectors[subjects:], texts[subjects:])
    return scores


def table(scores: Mapping[str, float | None], picture: Path, folders: Folders) -> str:
    """The scores and what to open next, as text."""
    lines = [f"{'':36}{'base':>8}{'tuned':>8}{'ceiling':>9}"]
    for key, title in TITLES.items():
        if f"{key}/base" in scores:
            ceiling = _number(scores["clip_i/real_to_real"]) if key == "clip_i" else ""
            base, tuned = (_number(scores[f"{key}/{name}"]) for name in ("base", "fine_tuned"))
            lines.append(f"{title:36}{base:>8}{tuned:>8}{ceiling:>9}".rstrip())
    lines += [
        "",
        f"Look at     {picture}",
        f"Adapters    {folders.adapters}",
        f"Curves      .venv/bin/tensorboard --logdir {folders.run / 'logs'}",
    ]
    return "\n".join(lines) + "\n"


def judge(scores: Scores, expected: Expected) -> str:
    """Say whether scores are where they should be.

    Raises:
        UserError: where one is far below.
    """
    known = {key for key in TITLES if f"{key}/fine_tuned" in scores}  # others may not be asked for
    wanted = expected.model_dump(include=known, exclude_none=True)
    given = {key: scores[f"{key}/fine_tuned"] for key in wanted}
    # a score that is not defined, or not a number, is as far off as can be
    found = {
        key: -1.0 if score is None or score != score else score for key, score in given.items()
    }
    short = {key: wanted[key] - found[key] for key in wanted}
    sentences = [
        f"{TITLES[key]} is {found[key]:.3f}, expected {wanted[key]:.3f}"
        for key in wanted
        if short[key] > expected.spread
    ]
    if not sentences:
        return f"As expected, to within {expected.spread}: the subject is learnt.\n"
    if max(short.values()) > FAR * expected.spread:
        raise UserError(
            f"The run did not learn what it should: {'; '.join(sentences)}. Compare its recipe with"
            " the one that these figures are of, and look at its curves."
        )
    return f"Lower than expected: {'; '.join(sentences)}. Another seed may do better.\n"


def _number(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"
