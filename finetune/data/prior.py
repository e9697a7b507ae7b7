"""Class pictures for prior preservation (DreamBooth, arXiv 2208.12242, section 3.3).

Taken from a folder, or sampled from the base cascade and kept for later runs.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm

from adapters import Cascade, Sample, load_cascade
from adapters.atomic import write_text
from adapters.cascade.load import Parts
from adapters.errors import UserError
from finetune.data.batches import CLASS, derived_seed
from finetune.data.captions import model_identity
from finetune.data.pictures import Picture, load_pictures
from finetune.data.sources import has_captions
from finetune.recipe.schema import Data, Prior, Recipe
from finetune.step.stages import STAGES
from unets.memory import free_memory

ATTEMPTS = 10
"""How many seeds a picture gets before its prompt is given up."""


def class_pictures(
    recipe: Recipe, embeds: Mapping[str, Tensor], device: torch.device
) -> list[Picture]:
    """The class pictures of a recipe with prior preservation, captioned by its prompts in turn.

    Args:
        recipe: with a ``prior`` section. The first ``prior.count`` pictures of ``prior.folder``,
            with their own captions where they have any; without a folder, pictures of the base
            cascade: each stage is taught those that it draws itself.
        embeds: text encodings [T, D] of the class prompts and the empty caption.
        device: where to sample.

    Raises:
        UserError: where the folder cannot be read, or where the base's safety checker rejects
            whatever a prompt gives.
    """
    prior = recipe.prior
    assert prior is not None
    own = own_folder(prior)
    if own is not None and has_captions(own):
        return _load(recipe, Data(source=str(own)), prior.count)
    data = Data(source=str(own), prompt=prior.prompts[0])
    if own is not None:
        pictures = _load(recipe, data, prior.count)
    else:
        pictures = _load_sampled(recipe, sampled_folder(recipe, prior, embeds, device), data)
    return [
        replace(picture, caption=_in_turn(prior.prompts, index))
        for index, picture in enumerate(pictures)
    ]


def _load(recipe: Recipe, data: Data, count: int) -> list[Picture]:
    sizes = {"smaller_px": recipe.smaller_crops_px}
    return load_pictures(data, recipe.cache, recipe.crop_px, count, **sizes)


def _load_sampled(recipe: Recipe, folder: Path, data: Data) -> list[Picture]:
    """Load each trained stage's pictures; those of the last hold the others as smaller ones."""
    by_size = {
        recipe.source(stage).picture_size_px: load_pictures(
            data.model_copy(update={"source": str(folder / stage.name)}),
            recipe.cache,
            recipe.source(stage).picture_size_px,
        )
        for stage in recipe.trained
    }
    *smaller, (_, pictures) = sorted(by_size.items())
    return [
        replace(picture, reduced={size: others[index].file for size, others in smaller})
        for index, picture in enumerate(pictures)
    ]


def own_folder(prior: Prior) -> Path | None:
    """The folder that class pictures are taken from; ``None``: they are sampled.

    Raises:
        UserError: where there is no such folder.
    """
    own = Path(prior.folder).expanduser() if prior.folder else None
    if own and not own.is_dir():
        raise UserError(
            f"prior.folder {prior.folder!r} is no folder: name one with pictures of the class, or"
            " leave the field out to sample them from the base."
        )
    return own


def sampled_folder(
    recipe: Recipe, prior: Prior, embeds: Mapping[str, Tensor], device: torch.device
) -> Path:
    """The folder of the base cascade's class pictures, with a folder of PNGs for each stage.

    Sampled where it is not in the cache. A folder of its final name is whole; sampling that was
    interrupted goes on where it stopped, and each picture has its own seed. Of runs that start
    together, one samples and the others wait for it.
    """
    base = recipe.base
    stages = [STAGES[1]] if recipe.stage_2 is None else list(STAGES.values())
    models = [recipe.base_of(stage) for stage in stages]
    identity = {
        "folders": [stage.name for stage in stages],
        "models": [model_identity(model, base) for model in models],
        "prompts": prior.prompts,
        "count": prior.count,
        "seed": recipe.seed,
        "sampling": prior.sampling.model_dump(exclude={"batch_size"}, exclude_none=True),
    }
    if not recipe.text.clean_caption:
        identity["clean_caption"] = False
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    folder = recipe.cache / "class_pictures" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{key}.lock")):
        if folder.is_dir():
            return folder
        partial = folder.with_name(f"{key}.partial")
        names = [f"{index:05d}.png" for index in range(prior.count)]
        places = {stage.number: partial / stage.name for stage in stages}
        _sample_missing(names, places, models, recipe, prior, embeds, device)
        rows = [
            json.dumps({"file_name": name, "text": _in_turn(prior.prompts, index)})
            for index, name in enumerate(names)
        ]
        for place in places.values():
            write_text(place / "metadata.jsonl", "\n".join(rows) + "\n")
        os.replace(partial, folder)
    return folder


def _sample_missing(
    names: Sequence[str],
    places: Mapping[int, Path],
    models: Sequence[str],
    recipe: Recipe,
    prior: Prior,
    embeds: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Sample what is missing of the files of these names, in the folder of each stage."""
    missing = [
        index
        for index, name in enumerate(names)
        if not all((place / name).exists() for place in places.values())
    ]
    if not missing:
        return
    base = recipe.base
    cascade = load_cascade(
        *models,
        revision=base.revision,
        variant=base.variant,
        device=device,
        dtype=recipe.precisions(device),
        parts=Parts(text_encoder=False),
    )
    with tqdm(total=len(missing), desc="Sampling class pictures") as progress:
        size = prior.sampling.batch_size
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            for index, sample in _sample(cascade, recipe, prior, embeds, batch).items():
                for stage, place in places.items():
                    sample.save(place / names[index], stage)
            progress.update(len(batch))
    del cascade
    free_memory(device)


def _sample(
    cascade: Cascade,
    recipe: Recipe,
    prior: Prior,
    embeds: Mapping[str, Tensor],
    indices: Sequence[int],
) -> dict[int, Sample]:
    """The samples of some indices; one that the safety checker rejects gets another seed."""
    samples: dict[int, Sample] = {}
    pending = list(indices)
    for attempt in range(ATTEMPTS):
        sampled = cascade(
            [_in_turn(prior.prompts, index) for index in pending],
            embeds=embeds,
            seed=[derived_seed(recipe.seed, CLASS, index, attempt) for index in pending],
            sampling=prior.sampling,
            clean_caption=recipe.text.clean_caption,
            progress=False,
        )
        samples |= dict(zip(pending, sampled, strict=True))
        pending = [index for index, flag in zip(pending, sampled.flagged, strict=True) if flag]
        if not pending:
            return samples
    raise UserError(
        f"prior.prompts: the base's safety checker rejected {ATTEMPTS} pictures of"
        f" {_in_turn(prior.prompts, pending[0])!r}; word it otherwise, or give prior.folder."
    )


def _in_turn(prompts: Sequence[str], index: int) -> str:
    return prompts[index % len(prompts)]
