"""Text encodings of captions, each made once by the pipeline's own text path and kept on disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import xxhash
from diffusers import IFPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.base.source import Source
from adapters.base.tensor_files import PYTORCH, save_tensors
from adapters.cascade.embeds import TENSOR
from adapters.checksums import digest_blocks
from adapters.errors import UserError, first_line, print_once
from adapters.input_files import expand_home
from adapters.progress import Bar
from adapters.texts import check_captions, check_vocabulary
from finetune.data.pictures import Picture
from finetune.data.rows import CLASSES
from finetune.data.sources import has_captions, load_captions
from finetune.recipe.schema import Data, OutputPrior, Prior, Recipe
from finetune.step.stages import STAGES
from unets.memory import free_memory
from unets.precision import Precision

TEXT_PARTS = ("text_encoder", "tokenizer")
"""The subfolders of a model that determine its text encodings."""

DIGEST = "xxh3_128"
"""The entry of an encoding's header with the digest of its values."""

LOADING_ERRORS = (OSError, KeyError, ValueError, SafetensorError)
"""The errors of a file that is missing, or holds something else than an encoding."""

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
    if prior and prior.folder and has_captions(expand_home(prior.folder)):
        own = load_captions(Data(source=prior.folder), recipe.cache, CLASSES)[: prior.count]
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
        """Tell whether a caption's encoding is there, as it was written."""
        try:
            self._load(caption)
        except LOADING_ERRORS:
            return False
        return True

    def read(self, caption: str) -> Tensor:
        """Read a caption's encoding [T, D], onto the CPU.

        Raises:
            UserError: if its file has been removed or damaged since the caption was encoded.
        """
        try:
            return self._load(caption)
        except LOADING_ERRORS as error:
            raise UserError(
                f"The encoding of {caption!r}, {self.path(caption)}, is missing or damaged"
                f" ({first_line(error)}): run the command again to encode it again."
            ) from error

    def _load(self, caption: str) -> Tensor:
        """Read a caption's encoding; raises :data:`LOADING_ERRORS` if it is not as written."""
        with safe_open(self.path(caption), framework="pt") as file:
            encoding, header = file.get_tensor(TENSOR), file.metadata() or {}
        if header.get(DIGEST) != _digest_tensor(encoding):
            raise ValueError("it has other bytes than were written")
        return encoding

    def write(self, caption: str, encoding: Tensor) -> None:
        """Keep a caption's encoding [T, D].

        Raises:
            UserError: if it is not finite, or the disk refuses.
        """
        encoding = encoding.cpu().contiguous()
        if not encoding.isfinite().all():
            raise UserError(
                f"The text encoder of {self.source.name} gives NaN or infinite values for"
                f" {caption!r} in {self.precision}: set text.precision to fp32, or if it is that,"
                " fetch the model's files again."
            )
        header = PYTORCH | {DIGEST: _digest_tensor(encoding)}
        save_tensors(self.path(caption), {TENSOR: encoding}, header, durable=False)

    def encode(self, captions: Iterable[str]) -> None:
        """Encode captions into the cache, then free the text encoder's memory."""
        pipeline = self.source.text_pipeline(self.precision, self.device)
        try:
            for caption in Bar(captions, "Encoding captions", delay=2):
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
    if damaged := [caption for caption in missing if cache.path(caption).exists()]:
        print_once(
            f"{len(damaged)} of {len(embeds)} encodings in {cache.folder} are damaged, or of an"
            " earlier version, and are made again"
        )
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
    files = {file for part in parts for file in folder.glob(f"{part}/*") if file.is_file()}
    named = {file.relative_to(folder).as_posix(): file for file in sorted(files)}
    return f"{digest_blocks(named)}:{source.variant}"


def _digest_tensor(tensor: Tensor) -> str:
    """Compute the digest of a tensor's shape, type and values."""
    digest = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
