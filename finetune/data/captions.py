"""Text encodings of captions, each made once by the pipeline's own text path and kept on disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from diffusers import IFPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from adapters.atomic import replacing
from adapters.base.source import Source
from adapters.cascade.embeds import TENSOR
from adapters.errors import UserError, first_line
from adapters.texts import check_captions, check_vocabulary
from finetune.data.pictures import Picture
from finetune.data.sources import has_captions, load_captions
from finetune.recipe.schema import Data, OutputPrior, Prior, Recipe
from finetune.step.stages import STAGES
from unets.memory import free_memory
from unets.precision import Precision

TEXT_PARTS = ("text_encoder", "tokenizer")
"""The subfolders of a model that determine its text encodings."""

WHOLE_BYTES = 2**28
"""The size up to which a model's file is hashed whole; a larger one is hashed in blocks."""

BLOCK_BYTES = 2**20
"""The size of a hashed block of a large file."""

BLOCKS = 100
"""The number of hashed blocks of a large file, evenly spaced from its first byte to its last."""

KEPT_ENCODINGS = 100
"""The number of encodings kept in memory, the most recently used."""

PROMPT_FIELDS = {
    "validation": ("prompts", "stage_2_prompts", "other_prompts"),
    "evaluation": ("prompts", "stage_2_prompts", "other_prompts", "class_prompts"),
}
"""The fields of a recipe that hold captions, by section, apart from those of the prior."""


def collect_captions(recipe: Recipe, pictures: Iterable[Picture]) -> dict[str, str]:
    """Collect all distinct captions that a run needs, including the empty one, sorted.

    Returns:
        Each caption with a description of its origin, for messages.
    """
    captions = {picture.caption: f"the caption of {picture.source}" for picture in pictures}
    prior = recipe.class_pictures
    if prior and prior.folder and has_captions(Path(prior.folder).expanduser()):
        own = load_captions(Data(source=prior.folder), recipe.cache)[: prior.count]
        captions |= dict.fromkeys(own, f"a caption of prior.folder {prior.folder}")
    return dict(sorted((captions | collect_prompts(recipe)).items()))


def collect_prompts(recipe: Recipe) -> dict[str, str]:
    """Collect the captions in the recipe itself, and the empty one, each with its field."""
    captions = {"": "the empty caption"}
    if recipe.prior:
        captions |= dict.fromkeys(_prior_prompts(recipe.prior), "prior.prompts")
    tree = recipe.model_dump(include={*PROMPT_FIELDS})
    for section, fields in PROMPT_FIELDS.items():
        for field in fields if tree[section] else ():
            captions |= dict.fromkeys(tree[section][field] or (), f"{section}.{field}")
    if recipe.data.prompt is not None:
        captions[recipe.data.prompt] = "data.prompt"
    return captions


def _prior_prompts(prior: Prior) -> tuple[str, ...]:
    """Return the captions of the prior that do not depend on the training data."""
    return prior.list_captions() if isinstance(prior, OutputPrior) else prior.prompts


def check_cleaning(captions: Mapping[str, str], *, clean_caption: bool) -> None:
    """Check captions as :func:`adapters.texts.check_captions` does, in a recipe's words."""
    check_captions(captions, clean_caption=clean_caption, setting="text.clean_caption: false")


@dataclass(frozen=True)
class CaptionCache:
    """The encodings on disk: one file per caption, named by a hash of all that determines it.

    The device is not part of the name, so another machine with the same ``text.precision`` reuses
    the encodings.
    """

    folder: Path
    source: Source
    """The model with the text encoder."""
    precision: Precision
    """The text encoder's precision."""
    device: torch.device
    """The device that encodes."""
    clean_caption: bool
    """Clean captions as IF's pipelines do."""

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device) -> "CaptionCache":
        """Return the cache for a recipe that is trained on a device."""
        text = recipe.text
        device = torch.device("cpu") if text.device == "cpu" else device
        return cls(
            recipe.cache / "prompt_embeds",
            recipe.source(STAGES[1]),
            text.precision_on(device),
            device,
            text.clean_caption,
        )

    @cached_property
    def _model(self) -> str:
        return model_identity(self.source, TEXT_PARTS)

    def path(self, caption: str) -> Path:
        """Return the file of a caption's encoding."""
        key = json.dumps([self._model, self.precision, self.clean_caption, caption])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def has(self, caption: str) -> bool:
        """Tell whether a caption's file exists and is whole, without reading its encoding."""
        place = self.path(caption)
        try:
            with safe_open(place, framework="pt") as file:
                return TENSOR in file.keys()  # noqa: SIM118 (a safe_open cannot be iterated over)
        except (OSError, SafetensorError):
            return False

    def read(self, caption: str) -> Tensor:
        """Read a caption's encoding [T, D], onto the CPU.

        Raises:
            UserError: if its file has been removed or damaged since the caption was encoded.
        """
        file = self.path(caption)
        try:
            return load_file(file)[TENSOR]
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(
                f"The encoding of {caption!r}, {file}, is missing or damaged"
                f" ({first_line(error)}): run the command again to encode it again."
            ) from error

    def write(self, caption: str, encoding: Tensor) -> None:
        """Keep a caption's encoding [T, D]."""
        with replacing(self.path(caption)) as temporary:
            save_file({TENSOR: encoding.cpu().contiguous()}, temporary)

    def encode(self, captions: Iterable[str]) -> None:
        """Encode captions into the cache, then free the text encoder's memory."""
        pipeline = self.source.text_pipeline(self.precision, self.device)
        try:
            for caption in tqdm(captions, "Encoding captions", delay=2):
                encoding, _ = pipeline.encode_prompt(
                    caption,
                    do_classifier_free_guidance=False,
                    device=self.device,
                    clean_caption=self.clean_caption,
                )
                self.write(caption, encoding[0])
        finally:
            pipeline.register_modules(text_encoder=None)
            del pipeline
            free_memory(self.device)


def embed_captions(
    captions: Mapping[str, str] | Iterable[str], cache: CaptionCache
) -> "PromptEmbeds":
    """Return the text encoding of each distinct caption, in the encoder's precision.

    Encodings equal those of ``IFPipeline.__call__`` bit for bit: each caption is encoded by itself,
    so its encoding does not depend on the other captions. The text encoder is loaded only if the
    cache lacks a caption.

    Args:
        captions: plain captions, which the text path cleans, or a mapping from each to a
            description of its origin.
        cache: encodes the captions and keeps their encodings.

    Raises:
        UserError: if the base model cannot be read, or if cleaning empties a caption.
    """
    places = captions if isinstance(captions, Mapping) else dict.fromkeys(captions, "the caption")
    check_cleaning(places, clean_caption=cache.clean_caption)
    embeds = PromptEmbeds(cache, captions)
    missing = {caption: places[caption] for caption in embeds if not cache.has(caption)}
    if missing:
        tokenizer = cache.source.tokenizer()
        check_vocabulary(missing, tokenizer, clean_caption=cache.clean_caption)
        cache.encode(missing)
    return embeds


class PromptEmbeds(Mapping[str, Tensor]):
    """Encodings [T, D] by caption, on the CPU, each read from the cache on access."""

    def __init__(self, cache: CaptionCache, captions: Iterable[str]) -> None:
        self._captions = dict.fromkeys(sorted(set(captions)))
        self._read = lru_cache(maxsize=KEPT_ENCODINGS)(cache.read)

    def __getitem__(self, caption: str) -> Tensor:
        if caption not in self._captions:
            raise KeyError(caption)
        return self._read(caption)

    def __contains__(self, caption: object) -> bool:
        return caption in self._captions

    def __iter__(self) -> Iterator[str]:
        return iter(self._captions)

    def __len__(self) -> int:
        return len(self._captions)


def model_identity(source: Source, parts: Sequence[str] = ("*",)) -> str:
    """Return a text that is the same for equal files of a model and different for others.

    Args:
        source: a folder, identified by the names, sizes and content of its files (for large ones,
            evenly spaced blocks); or a hub name, identified by itself and its revision's commit.
        parts: patterns of the subfolders that count, in a folder.

    Raises:
        UserError: if the model is neither a folder nor available from the hub.
    """
    folder = Path(source.name)
    if not folder.is_dir():
        return f"{source.name}@{_find_commit(source)}:{source.variant}"
    digest = hashlib.sha256()
    files = {file for part in parts for file in folder.glob(f"{part}/*") if file.is_file()}
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"\n{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= WHOLE_BYTES:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            for block in range(BLOCKS):
                stream.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return f"{digest.hexdigest()}:{source.variant}"


def _find_commit(source: Source) -> str:
    """Find the commit of a hub model's revision, or of the local copy without a connection."""
    try:
        index = hf_hub_download(source.name, IFPipeline.config_name, revision=source.revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The base model {source.name!r} is neither a folder nor available from the Hugging"
            f" Face hub ({first_line(error)}): correct the name, or accept the model's licence on"
            " its page and log in with `hf auth login`."
        ) from error
    return Path(index).parent.name
