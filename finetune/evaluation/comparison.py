"""A comparison of the base and the fine-tuned cascade: one picture to look at, and CLIP scores."""

import json
import math
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
from adapters.tables import format_facts, format_table
from finetune.data.captions import CaptionCache, collect_prompts, embed_captions
from finetune.data.pictures import crop, load_pictures
from finetune.evaluation.metrics import ClipScorer, clip_i, clip_i_ceiling, clip_t
from finetune.recipe.schema import Evaluation, Expected, Recipe
from finetune.run.folders import Folders
from finetune.step.stages import STAGES

Scores: TypeAlias = dict[str, float | None]
"""Scores by name and cascade, such as ``clip_i/base``; ``None``: not defined."""

TITLES = {
    "clip_i": "CLIP-I, generated vs. real pictures",
    "clip_t": "CLIP-T, picture vs. prompt",
    "clip_t_others": "CLIP-T, prompts without the subject",
}

FAR = 3
"""The number of spreads below the expected score at which chance no longer explains the score."""


def compare(recipe: Recipe) -> tuple[str, Scores]:
    """Write ``before_after.png`` and ``.json`` into the run's folder.

    Returns:
        The scores as a table to print, and by name.

    Raises:
        UserError: if the recipe has no ``evaluation`` section, or the run has no adapters.
    """
    settings, folders = recipe.evaluation, Folders(recipe.folder)
    if settings is None:
        raise UserError("The recipe needs a `evaluation` section: prompts, subject and clip.")
    if not folders.adapters.is_dir():
        raise UserError(f"There are no adapters in {folders.adapters}: train the recipe first.")
    prompts = settings.prompts + settings.other_prompts
    base, fine_tuned = sample_both(recipe, settings, prompts, folders.adapters)
    last = STAGES[2 if recipe.base.stage_2 else 1]
    size_px, rng = recipe.source(last).picture_size_px, np.random.default_rng(0)
    photos = [
        crop(picture, size_px, rng, center_shift=0.0, horizontal_flip=False)
        for picture in load_pictures(recipe.data, recipe.cache, size_px)
    ]
    sheet = contact_sheet(
        [photos[: len(prompts)], base, fine_tuned],
        row_captions=["your pictures", "base", "fine-tuned"],
        column_captions=prompts,
        title=f"{recipe.name}: the base, and the fine-tuned cascade",
    )
    scores = score(settings, photos, base, fine_tuned)
    picture = folders.run / "before_after.png"
    sheet.save(picture)
    write_text(folders.run / "before_after.json", json.dumps(scores, indent=2) + "\n")
    facts = [
        ("Look at", str(picture)),
        ("Adapters", str(folders.adapters)),
        ("Curves", f".venv/bin/tensorboard --logdir {folders.run / 'logs'}"),
    ]
    return f"{tabulate(scores)}\n\n{format_facts(facts)}\n", scores


def sample_both(
    recipe: Recipe, settings: Evaluation, prompts: Sequence[str], adapters: Path
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Sample the final stage's picture of each prompt, without and with the adapters."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = settings.stage_2_prompts
    stage_2_prompts = None if own is None else own + settings.other_prompts
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
            seed=settings.seed,
            sampling=settings.sampling or recipe.validation.sampling,
        )

    base = sample()
    cascade.add_adapter(adapters)
    return list(base.final), list(sample().final)


def score(
    settings: Evaluation,
    photos: Sequence[Image.Image],
    base: Sequence[Image.Image],
    fine_tuned: Sequence[Image.Image],
) -> Scores:
    """Compute CLIP-I of the subject's prompts, and CLIP-T of these and of the other prompts."""
    scorer = ClipScorer(settings.clip)
    real, subjects = scorer.images(photos), len(settings.prompts)
    texts = scorer.texts(
        [
            prompt.replace(settings.identifier, settings.subject)
            for prompt in settings.prompts + settings.other_prompts
        ]
    )
    scores: Scores = {"clip_i/real_to_real": clip_i_ceiling(real)}
    for name, pictures in (("base", base), ("fine_tuned", fine_tuned)):
        vectors = scorer.images(pictures)
        scores[f"clip_i/{name}"] = clip_i(vectors[:subjects], real)
        scores[f"clip_t/{name}"] = clip_t(vectors[:subjects], texts[:subjects])
        if settings.other_prompts:
            scores[f"clip_t_others/{name}"] = clip_t(vectors[subjects:], texts[subjects:])
    return scores


def tabulate(scores: Mapping[str, float | None]) -> str:
    """Lay scores out as a table."""
    columns = {"base": "base", "fine-tuned": "fine_tuned", "ceiling": "real_to_real"}
    rows = [
        (title, *(_format(scores, f"{key}/{name}") for name in columns.values()))
        for key, title in TITLES.items()
        if f"{key}/base" in scores
    ]
    return format_table([("", *columns), *rows])


def _format(scores: Mapping[str, float | None], key: str) -> str:
    score = scores.get(key)
    return f"{score:.3f}" if score is not None else "-" if key in scores else ""


def judge(scores: Scores, expected: Expected) -> str:
    """Say in a sentence how the scores compare with the expected ones.

    Raises:
        UserError: if a score is far below the expected one.
    """
    known = {key for key in TITLES if f"{key}/fine_tuned" in scores}  # CLIP-T of others is optional
    shortfalls, sentences = [], []
    for key, wanted in expected.model_dump(include=known, exclude_none=True).items():
        score = scores[f"{key}/fine_tuned"]
        # a score that is undefined or not a number counts as the worst possible
        found = -1.0 if score is None or math.isnan(score) else score
        shortfalls.append(wanted - found)
        if wanted - found > expected.spread:
            sentences.append(f"{TITLES[key]} is {found:.3f}, expected {wanted:.3f}")
    if not sentences:
        return f"As expected, to within {expected.spread}: the subject is learnt.\n"
    if max(shortfalls) > FAR * expected.spread:
        raise UserError(
            f"The run did not learn what it should: {'; '.join(sentences)}. Compare its recipe with"
            " the one that the expected scores come from, and look at its curves."
        )
    return f"Lower than expected: {'; '.join(sentences)}. Another seed may do better.\n"
