"""Class pictures for prior preservation (DreamBooth, arXiv 2208.12242, section 3.3).

They are taken from a folder, or sampled from the base cascade and kept for later runs.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from adapters import Cascade, Sample, load_cascade
from adapters.atomic import write_text
from adapters.cascade.load import Parts
from adapters.checksums import find_damage, write_sums
from adapters.errors import UserError, print_once
from adapters.input_files import expand_home
from adapters.progress import Bar
from finetune.data.batches import CLASS, derived_seed
from finetune.data.captions import model_identity
from finetune.data.picture_folders import open_folder
from finetune.data.pictures import Picture, load_pictures
from finetune.data.rows import CLASSES
from finetune.data.sources import has_captions
from finetune.recipe.schema import Base, Data, PicturePrior, Recipe
from finetune.step.stages import STAGES, Stage
from unets.memory import free_memory
from unets.precision import Precision

METADATA = "metadata.jsonl"
"""The file with the captions of a stage's pictures."""

ATTEMPTS = 10
"""The number of seeds tried for a picture before its prompt is given up."""


def own_folder(prior: PicturePrior) -> Path | None:
    """Return the folder that class pictures are taken from; ``None``: they are sampled.

    Raises:
        UserError: if the folder does not exist.
    """
    own = expand_home(prior.folder) if prior.folder else None
    if own and open_folder(own) is None:
        raise UserError(
            f"prior.folder {prior.folder!r} is neither a folder nor a zip: name one with pictures"
            " of the class, or leave the field out to sample them from the base."
        )
    return own


def load_own(prior: PicturePrior, cache_dir: Path, crops_px: Sequence[int]) -> list[Picture] | None:
    """Load the first ``prior.count`` pictures in ``prior.folder``, with captions.

    They are their own, if they have any, or else the prompts in rotation.

    Returns:
        The pictures; ``None``: there is no folder, and they are sampled.

    Raises:
        UserError: if the folder cannot be read.
    """
    own = own_folder(prior)
    if own is None:
        return None
    captioned = has_captions(own)
    data = Data(source=str(own), prompt=None if captioned else prior.prompts[0])
    pictures = load_pictures(data, cache_dir, *crops_px, limit=prior.count, wording=CLASSES)
    return pictures if captioned else _caption_in_rotation(pictures, prior.prompts)


def _caption_in_rotation(pictures: Sequence[Picture], prompts: Sequence[str]) -> list[Picture]:
    return [
        replace(picture, caption=prompt)
        for picture, prompt in zip(pictures, cycle(prompts), strict=False)
    ]


@dataclass(frozen=True, kw_only=True)
class ClassPictures:
    """The class pictures of a recipe, and the base cascade that draws them."""

    prior: PicturePrior
    crops_px: Sequence[int]
    """The sides of the crops that the trained stages take, ascending."""
    cache_dir: Path
    base: Base
    stages: Sequence[Stage]
    """Stage I, and Stage II if it is trained."""
    precisions: Mapping[int, Precision]
    """The precision of each stage's UNet."""
    device: torch.device
    embeds: Mapping[str, Tensor]
    """Text encodings [T, D] of the class prompts and the empty caption."""
    clean_caption: bool
    """True if the encoded prompts were cleaned."""
    seed: int

    @classmethod
    def of(
        cls, recipe: Recipe, embeds: Mapping[str, Tensor], device: torch.device
    ) -> "ClassPictures":
        """Return the class pictures of a recipe that uses some and is trained on a device."""
        assert recipe.class_pictures is not None
        return cls(
            prior=recipe.class_pictures,
            crops_px=recipe.crops_px,
            cache_dir=recipe.cache,
            base=recipe.base,
            stages=[STAGES[1]] if recipe.stage_2 is None else list(STAGES.values()),
            precisions=recipe.precisions_on(device),
            device=device,
            embeds=embeds,
            clean_caption=recipe.text.clean_caption,
            seed=recipe.seed,
        )

    def load(self) -> list[Picture]:
        """Load the pictures, captioned with the prompts in rotation.

        They are the first ``prior.count`` pictures in ``prior.folder``, with their own captions if
        they have any. Without a folder, they are samples of the base cascade, and each stage is
        trained on its own samples.

        Raises:
            UserError: if the folder cannot be read, or the base's safety checker rejects all
                pictures of a prompt.
        """
        own = load_own(self.prior, self.cache_dir, self.crops_px)
        if own is not None:
            return own
        return _caption_in_rotation(self._load_sampled(), self.prior.prompts)

    def _prompt(self, index: int) -> str:
        return self.prior.prompts[index % len(self.prior.prompts)]

    def _load_sampled(self) -> list[Picture]:
        """Load each stage's own samples; the smaller ones serve as reductions of the largest."""
        folder = self._sampled_folder()
        places = {self.base.source(s).picture_size_px: folder / s.name for s in self.stages}
        *smaller, largest = [
            load_pictures(Data(source=str(places[px]), prompt=self._prompt(0)), self.cache_dir, px)
            for px in self.crops_px
        ]
        sizes = list(zip(self.crops_px[:-1], smaller, strict=True))
        return [
            replace(picture, reduced={px: others[row].file for px, others in sizes})
            for row, picture in enumerate(largest)
        ]

    def _sampled_folder(self) -> Path:
        """Return the folder of the base cascade's samples, with a folder of PNGs for each stage.

        A folder with its final name is complete. Interrupted sampling goes on where it stopped, and
        pictures that have been lost or damaged since are sampled again, since each has its own
        seed. If several runs start at once, one samples and the others wait.
        """
        identity = {
            "folders": [stage.name for stage in self.stages],
            "models": [model_identity(self.base.source(stage)) for stage in self.stages],
            "prompts": self.prior.prompts,
            "count": self.prior.count,
            "seed": self.seed,
            "sampling": self.prior.sampling.model_dump(exclude={"batch_size"}, exclude_none=True),
        }
        if not self.clean_caption:
            identity["clean_caption"] = False
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        folder = self.cache_dir / "class_pictures" / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{key}.lock")):
            if not folder.is_dir():
                partial = folder.with_name(f"{key}.partial")
                self._sample_into(partial)
                os.replace(partial, folder)
            elif damaged := [name for name in self._names if find_damage(folder, [name])]:
                print_once(
                    f"{len(damaged)} of {len(self._names)} files in {folder} are damaged, or of an"
                    " earlier version, and are made again"
                )
                for name in damaged:
                    (folder / name).unlink(missing_ok=True)
                self._sample_into(folder)
        return folder

    @property
    def _pictures(self) -> list[str]:
        """The names of the sampled pictures of a stage."""
        return [f"{index:05d}.png" for index in range(self.prior.count)]

    @property
    def _names(self) -> list[str]:
        """The files of the base cascade's samples, by their paths in their folder."""
        files = [*self._pictures, METADATA]
        return [f"{stage.name}/{file}" for stage in self.stages for file in files]

    def _sample_into(self, folder: Path) -> None:
        """Sample the pictures that any stage lacks, list all in its metadata, and seal the folder.

        A write that is killed leaves the folder with other checksums than its files have, so that
        these are made again.
        """
        places = {stage.number: folder / stage.name for stage in self.stages}
        names = self._pictures
        missing = [
            index
            for index, name in enumerate(names)
            if not all((place / name).exists() for place in places.values())
        ]
        if missing:
            cascade = load_cascade(
                self.base.stage_1,
                self.base.stage_2 if 2 in places else None,
                revision=self.base.revision,
                variant=self.base.variant,
                device=self.device,
                dtype=self.precisions,
                parts=Parts(text_encoder=False),
            )
            size = self.prior.sampling.batch_size
            with Bar(total=len(missing), desc="Sampling class pictures") as progress:
                for start in range(0, len(missing), size):
                    batch = missing[start : start + size]
                    for index, sample in self._sample(cascade, batch).items():
                        for stage, place in places.items():
                            sample.save(place / names[index], stage)
                    progress.update(len(batch))
            del cascade
            free_memory(self.device)
        rows = [
            json.dumps({"file_name": name, "text": self._prompt(index)})
            for index, name in enumerate(names)
        ]
        for place in places.values():
            write_text(place / METADATA, "\n".join(rows) + "\n")
        write_sums(folder, self._names)

    def _sample(self, cascade: Cascade, indices: Sequence[int]) -> dict[int, Sample]:
        """Sample some pictures; one that the safety checker rejects gets another seed."""
        samples: dict[int, Sample] = {}
        pending = list(indices)
        for attempt in range(ATTEMPTS):
            sampled = cascade(
                [self._prompt(index) for index in pending],
                embeds=self.embeds,
                seed=[derived_seed(self.seed, CLASS, index, attempt) for index in pending],
                sampling=self.prior.sampling,
                clean_caption=self.clean_caption,
                progress=False,
            )
            samples |= dict(zip(pending, sampled, strict=True))
            pending = [index for index, flag in zip(pending, sampled.flagged, strict=True) if flag]
            if not pending:
                return samples
        raise UserError(
            f"prior.prompts: the base's safety checker rejected {ATTEMPTS} pictures of"
            f" {self._prompt(pending[0])!r}; reword it, or give prior.folder."
        )
