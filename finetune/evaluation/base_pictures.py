"""The base's pictures, kept between evaluations: the same base draws the same pictures only once.

They are kept batch by batch, as a picture's last bits may depend on those that it is drawn with.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from filelock import FileLock
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import TypedDict

from adapters.atomic import write_text
from adapters.base.source import Source
from adapters.cascade.provenance import read_picture_info
from adapters.cascade.results import Sample
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError, __version__
from adapters.pictures.png import Signed
from adapters.pictures.reading import read_picture
from finetune.data.captions import model_identity
from finetune.recipe.schema import Recipe
from finetune.step.stages import STAGES

FORMAT = 1
"""The version of the folders' layout and of how the pictures are drawn."""

RECORD = "record.json"
"""The file beside a batch's pictures that says that all are there."""


class Record(TypedDict):
    """The content of that file."""

    digests: dict[str, str]
    """The SHA-256 of each picture's file, by name."""
    stages: list[int]
    """The stages that drew."""
    flagged: list[bool]
    """True for each picture that a safety checker has blackened."""


RECORDS = TypeAdapter(Record)


@dataclass(frozen=True)
class BasePictures:
    """The kept pictures of one base, drawn with one set of settings."""

    folder: Path

    @classmethod
    def of(cls, recipe: Recipe, sampling: Sampling, device: torch.device) -> "BasePictures":
        """Find the folder of a recipe's base, drawn on a device.

        Raises:
            UserError: if a model is neither a folder nor available from the hub.
        """
        base = recipe.base
        sources = [recipe.source(STAGES[1])]
        sources += [recipe.source(STAGES[2])] if base.stage_2 else []
        sources += [Source(base.stage_3, 3)] if base.stage_3 else []
        depends_on = [
            FORMAT,
            (__version__, torch.__version__, diffusers.__version__),
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            base.model_dump(mode="json"),
            [model_identity(source) for source in sources],
            recipe.precisions_on(device),
            recipe.text.clean_caption,
            sampling.model_dump(mode="json"),
        ]
        return cls(recipe.cache / "base_pictures" / _digest(depends_on)[:16])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes waiting that would draw the same pictures."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            yield

    def place(self, shots: Sequence[Any], embeds: Mapping[str, Tensor]) -> Path:
        """Return the folder of a batch, named by its prompts, their encodings and its seeds."""
        drawn = [[shot.prompt, shot.stage_2_prompt, shot.seed] for shot in shots]
        texts = sorted({"", *(text for *prompts, _ in drawn for text in prompts)})
        encodings = {text: _digest_tensor(embeds[text]) for text in texts}
        return self.folder / _digest([drawn, encodings])[:16]


def keep_batch(folder: Path, samples: Sequence[Sample]) -> None:
    """Write a batch's pictures, those of all stages."""
    stages = list(samples[0].pictures)
    files = list_files(folder, len(samples), stages)
    for sample, own in zip(samples, files, strict=True):
        for stage, file in own.items():
            sample.save(file, stage)
    record = Record(
        digests={file.name: _digest_file(file) for own in files for file in own.values()},
        stages=stages,
        flagged=[sample.flagged for sample in samples],
    )
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")  # the last, so all are there


def read_batch(folder: Path, count: int) -> tuple[Sample, ...] | None:
    """Read a batch's pictures; ``None`` if they are not all there and whole."""
    try:
        record = RECORDS.validate_json((folder / RECORD).read_bytes(), strict=True)
        files = list_files(folder, count, record["stages"])
        found = {file.name: _digest_file(file) for own in files for file in own.values()}
        if found != record["digests"] or len(record["flagged"]) != count:
            return None
        return tuple(map(_read_sample, files, record["flagged"]))
    except (OSError, ValidationError, UserError):
        return None


def list_files(folder: Path, count: int, stages: Sequence[int]) -> list[dict[int, Path]]:
    """List the files of a batch's pictures, by stage."""
    return [
        {stage: folder / f"{index:03d}-stage_{stage}.png" for stage in stages}
        for index in range(count)
    ]


def _read_sample(files: Mapping[int, Path], flagged: bool) -> Sample:
    info = read_picture_info(files[max(files)])
    pictures = {
        stage: Signed.of(read_picture(file), info.of_stage(stage).texts)
        for stage, file in files.items()
    }
    return Sample(pictures, info.prompts[1], info.seed, flagged, info)


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


def _digest_tensor(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()


def _digest_file(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
