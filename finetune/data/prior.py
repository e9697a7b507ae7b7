"""Class pictures for prior preservation (DreamBooth, arXiv 2208.12242, section 3.3).

Taken from a folder, or sampled from the base cascade and kept for later runs.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm

from adapters import Cascade, Sample, load_cascade
from adapters.atomic import write_text
from adapters.base.source import Source
from adapters.cascade.load import Parts
from adapters.errors import UserError
from finetune.data.batches import CLASS, derived_seed
from finetune.data.captions import model_identity
from finetune.data.pictures import Picture, load_pictures
from finetune.data.sources import has_captions
from finetune.recipe.schema import Base, Data, Prior, Recipe
from finetune.step.stages import STAGES, Stage
from unets.loading import Precision
from unets.memory import free_memory

ATTEMPTS = 10
"""The number of seeds a picture gets before its prompt is given up."""


@dataclass(frozen=True, kw_only=True)
class BaseCascade:
    """The cascade that draws class pictures, and what it draws them with."""

    base: Base
    stages: Sequence[Stage]
    """Stage I, and Stage II if it is trained."""
    precisions: Mapping[int, Precision]
    """The precision of each stage's UNet."""
    device: torch.device
    embeds: Mapping[str, Tensor]
    """Text encodings [T, D] of the class prompts and the empty caption."""
    clean_caption: bool
    """Whether the encoded prompts were cleaned."""
    seed: int
    """The recipe's seed."""

    @classmethod
    def of(
        cls, recipe: Recipe, embeds: Mapping[str, Tensor], device: torch.device
    ) -> "BaseCascade":
        """The base of a recipe that is trained on a device."""
        return cls(
            base=recipe.base,
            stages=[STAGES[1]] if recipe.stage_2 is None else list(STAGES.values()),
            precisions=recipe.precisions_on(device),
            device=device,
            embeds=embeds,
            clean_caption=recipe.text.clean_caption,
            seed=recipe.seed,
        )

    @property
    def sources(self) -> list[Source]:
        """The files of each stage's model."""
        return [self.base.source(stage) for stage in self.stages]


def class_pictures(
    prior: Prior, crops_px: Sequence[int], cache_dir: Path, cascade: BaseCascade
) -> list[Picture]:
    """Get the class pictures, captioned by the prompts in turn.

    Args:
        prior: the recipe's section. The first ``count`` pictures of its ``folder``, with their own
            captions if they have any; without a folder, pictures of the base cascade: each stage
            is trained on those that it draws itself.
        crops_px: the sides of the crops that the trained stages take, ascending.
        cache_dir: the recipe's cache.
        cascade: draws the pictures that neither folder nor cache has.

    Raises:
        UserError: if the folder cannot be read, or the base's safety checker rejects all pictures
            of a prompt.
    """
    own = own_folder(prior)
    if own is not None and has_captions(own):
        return load_pictures(Data(source=str(own)), cache_dir, *crops_px, limit=prior.count)
    data = Data(source=str(own), prompt=prior.prompts[0])
    if own is not None:
        pictures = load_pictures(data, cache_dir, *crops_px, limit=prior.count)
    else:
        folder = sampled_folder(prior, cache_dir, cascade)
        places = {source.picture_size_px: f"stage_{source.stage}" for source in cascade.sources}
        *smaller, pictures = [
            load_pictures(
                data.model_copy(update={"source": str(folder / places[size_px])}),
                cache_dir,
                size_px,
            )
            for size_px in crops_px
        ]
        sizes = list(zip(crops_px[:-1], smaller, strict=True))
        pictures = [
            replace(picture, reduced={px: others[row].file for px, others in sizes})
            for row, picture in enumerate(pictures)
        ]
    return [
        replace(picture, caption=_take_turn(prior.prompts, index))
        for index, picture in enumerate(pictures)
    ]


def own_folder(prior: Prior) -> Path | None:
    """The folder that class pictures are taken from; ``None``: they are sampled.

    Raises:
        UserError: if there is no such folder.
    """
    own = Path(prior.folder).expanduser() if prior.folder else None
    if own and not own.is_dir():
        raise UserError(
            f"prior.folder {prior.folder!r} is no folder: name one with pictures of the class, or"
            " leave the field out to sample them from the base."
        )
    return own


def sampled_folder(prior: Prior, cache_dir: Path, cascade: BaseCascade) -> Path:
    """The folder of the base cascade's class pictures, with a folder of PNGs for each stage.

    Sampled if it is not in the cache. A folder of its final name is whole; interrupted sampling
    goes on where it stopped, and each picture has its own seed. Of runs that start together, one
    samples and the others wait for it.
    """
    stages = [stage.name for stage in cascade.stages]
    identity = {
        "folders": stages,
        "models": [model_identity(source) for source in cascade.sources],
        "prompts": prior.prompts,
        "count": prior.count,
        "seed": cascade.seed,
        "sampling": prior.sampling.model_dump(exclude={"batch_size"}, exclude_none=True),
    }
    if not cascade.clean_caption:
        identity["clean_caption"] = False
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    folder = cache_dir / "class_pictures" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{key}.lock")):
        if folder.is_dir():
            return folder
        partial = folder.with_name(f"{key}.partial")
        names = [f"{index:05d}.png" for index in range(prior.count)]
        _sample_missing(names, partial, prior, cascade)
        rows = [
            json.dumps({"file_name": name, "text": _take_turn(prior.prompts, index)})
            for index, name in enumerate(names)
        ]
        for stage in stages:
            write_text(partial / stage / "metadata.jsonl", "\n".join(rows) + "\n")
        os.replace(partial, folder)
    return folder


def _sample_missing(names: Sequence[str], folder: Path, prior: Prior, cascade: BaseCascade) -> None:
    """Sample the files of these names that a stage's folder lacks."""
    places = {stage.number: folder / stage.name for stage in cascade.stages}
    missing = [
        index
        for index, name in enumerate(names)
        if not all((place / name).exists() for place in places.values())
    ]
    if not missing:
        return
    base, size = cascade.base, prior.sampling.batch_size
    loaded = load_cascade(
        base.stage_1,
        base.stage_2 if len(cascade.stages) > 1 else None,
        revision=base.revision,
        variant=base.variant,
        device=cascade.device,
        dtype=cascade.precisions,
        parts=Parts(text_encoder=False),
    )
    with tqdm(total=len(missing), desc="Sampling class pictures") as progress:
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            for index, sample in _sample(loaded, batch, prior, cascade).items():
                for stage, place in places.items():
                    sample.save(place / names[index], stage)
            progress.update(len(batch))
    del loaded
    free_memory(cascade.device)


def _sample(
    loaded: Cascade, indices: Sequence[int], prior: Prior, cascade: BaseCascade
) -> dict[int, Sample]:
    """Sample some indices; a picture that the safety checker rejects gets another seed."""
    samples: dict[int, Sample] = {}
    pending = list(indices)
    for attempt in range(ATTEMPTS):
        sampled = loaded(
            [_take_turn(prior.prompts, index) for index in pending],
            embeds=cascade.embeds,
            seed=[derived_seed(cascade.seed, CLASS, index, attempt) for index in pending],
            sampling=prior.sampling,
            clean_caption=cascade.clean_caption,
            progress=False,
        )
        samples |= dict(zip(pending, sampled, strict=True))
        pending = [index for index, flag in zip(pending, sampled.flagged, strict=True) if flag]
        if not pending:
            return samples
    raise UserError(
        f"prior.prompts: the base's safety checker rejected {ATTEMPTS} pictures of"
        f" {_take_turn(prior.prompts, pending[0])!r}; word it otherwise, or give prior.folder."
    )


def _take_turn(prompts: Sequence[str], index: int) -> str:
    return prompts[index % len(prompts)]
