"""Text encodings of captions: each made once, by the pipeline's own text path, and kept on disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import IFPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from adapters.atomic import replacing
from adapters.base.hub import split_revision
from adapters.cascade.embeds import TENSOR
from adapters.errors import UserError
from adapters.texts import check_captions, check_vocabulary
from finetune.data.pictures import Picture
from finetune.data.sources import has_captions, load_captions
from finetune.recipe.schema import Base, Data, Recipe
from finetune.step.stages import STAGES
from unets.memory import free_memory

TEXT_PARTS = ("text_encoder", "tokenizer")
"""The subfolders of a model that decide on its text encodings."""

WHOLE_BYTES = 2**28
"""Up to this size, a model's file is hashed whole; a larger one in blocks."""

BLOCK_BYTES = 2**20
"""The size of a hashed block of a large file."""

PROMPT_FIELDS = {
    "validation": ("prompts", "stage_2_prompts"),
    "prior": ("prompts",),
    "comparison": ("prompts", "stage_2_prompts", "other_prompts"),
}
"""The lists of captions that a recipe itself holds, by section."""

BLOCKS = 100
"""How many blocks are hashed of a large file, evenly spaced from its first byte to its last."""

KEPT_ENCODINGS = 100
"""How many encodings are kept in memory, those used last."""


def embed_captions(
    captions: Mapping[str, str] | Iterable[str], recipe: Recipe, device: torch.device
) -> "PromptEmbeds":
    """The text encoding of each distinct caption, in the encoder's precision.

    Bit for bit what ``IFPipeline.__call__`` makes of the caption: each is encoded by itself, so its
    encoding does not depend on its company. The text encoder is loaded only where the cache lacks
    a caption, and is gone from memory when this returns.

    Args:
        captions: plain captions, or these with where each is written; cleaning them is part of the
            text path.
        recipe: its ``base``, ``text`` and ``cache_dir``.
        device: the training device.

    Raises:
        UserError: where the base model cannot be read, or cleaning empties a caption.
    """
    places = captions if isinstance(captions, Mapping) else dict.fromkeys(captions, "the caption")
    check_cleaning(places, recipe)
    cache = CaptionCache(recipe, device)
    embeds = PromptEmbeds(cache, captions)
    missing = [caption for caption in embeds if not cache.has(caption)]
    if missing:
        tokenizer = recipe.source(STAGES[1]).tokenizer()
        unseen = {caption: places[caption] for caption in missing}
        check_vocabulary(unseen, tokenizer, clean_caption=recipe.text.clean_caption)
        with text_pipeline(recipe, cache.precision, cache.device) as pipeline:
            for caption in tqdm(missing, "Encoding captions", delay=2):
                encoding, _ = pipeline.encode_prompt(
                    caption,
                    do_classifier_free_guidance=False,
                    device=cache.device,
                    clean_caption=recipe.text.clean_caption,
                )
                cache.write(caption, encoding[0])
    return embeds


def captions_of(recipe: Recipe, pictures: Iterable[Picture]) -> dict[str, str]:
    """All distinct captions that a run needs, sorted, each with where it is written.

    The empty caption is one of them.
    """
    captions = {picture.caption: f"the caption of {picture.source}" for picture in pictures}
    prior = recipe.prior
    if prior and prior.folder and has_captions(Path(prior.folder).expanduser()):
        own = load_captions(Data(source=prior.folder), recipe.cache)[: prior.count]
        captions |= dict.fromkeys(own, f"a caption of prior.folder {prior.folder}")
    captions |= written_captions(recipe)
    return dict(sorted(captions.items()))


def written_captions(recipe: Recipe) -> dict[str, str]:
    """The captions that a recipe itself holds, and the empty one, each with its field."""
    captions = {"": "the empty caption"}
    tree = recipe.model_dump(include={"data", *PROMPT_FIELDS})
    for section, fields in PROMPT_FIELDS.items():
        for field in fields if tree[section] else ():
            captions |= dict.fromkeys(tree[section][field] or (), f"{section}.{field}")
    if recipe.data.prompt is not None:
        captions[recipe.data.prompt] = "data.prompt"
    return captions


def check_cleaning(captions: Mapping[str, str], recipe: Recipe) -> None:
    """Refuse captions that cleaning empties, and say which words others lose.

    Args:
        captions: each with where it is written.
        recipe: says whether captions are cleaned.

    Raises:
        UserError: where cleaning leaves nothing of a caption.
    """
    setting = "text.clean_caption: false"
    check_captions(captions, clean_caption=recipe.text.clean_caption, setting=setting)


class CaptionCache:
    """The encodings on disk: one file a caption, named by all that decides on its content.

    The device is not part of the name, so what one machine encodes another reuses, given the same
    ``text.precision``.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        text = recipe.text
        self.device = torch.device("cpu") if text.device == "cpu" else device
        """Where captions are encoded."""
        automatic = "fp32" if self.device.type == "cpu" else "bf16"
        self.precision = automatic if text.precision == "auto" else text.precision
        """The text encoder's precision; never ``auto``."""
        self._folder = recipe.cache / "prompt_embeds"
        self._model = model_identity(recipe.base.stage_1, recipe.base, TEXT_PARTS)
        self._clean_caption = text.clean_caption

    def path(self, caption: str) -> Path:
        """The file of a caption."""
        key = json.dumps([self._model, self.precision, self._clean_caption, caption])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def has(self, caption: str) -> bool:
        """Whether a caption's file is there and whole; its encoding is not read."""
        try:
            with safe_open(self.path(caption), framework="pt") as file:
                return TENSOR in file.keys()  # noqa: SIM118 (a safe_open cannot be iterated over)
        except (OSError, SafetensorError):
            return False

    def read(self, caption: str) -> Tensor:
        """A caption's encoding [T, D], on the CPU.

        Raises:
            UserError: where its file has gone or been damaged since it was encoded.
        """
        file = self.path(caption)
        try:
            return load_file(file)[TENSOR]
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(
                f"The encoding of {caption!r}, {file}, is missing or damaged"
                f" ({_first_line(error)}): run the command again to encode it anew."
            ) from error

    def write(self, caption: str, encoding: Tensor) -> None:
        """Keep a caption's encoding [T, D]."""
        with replacing(self.path(caption)) as temporary:
            save_file({TENSOR: encoding.cpu().contiguous()}, temporary)


class PromptEmbeds(Mapping[str, Tensor]):
    """Captions and their encodings [T, D], on the CPU; each is read when it is asked for."""

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


@contextmanager
def text_pipeline(recipe: Recipe, precision: str, device: torch.device) -> Iterator[IFPipeline]:
    """Stage I's pipeline with its text encoder and tokenizer alone, which is freed afterwards.

    It draws no pictures, so the components that guard pictures are not loaded either.
    """
    source = recipe.source(STAGES[1])
    pipeline = source.text_pipeline(precision, device)
    try:
        yield pipeline
    finally:
        pipeline.register_modules(text_encoder=None)
        del pipeline
        free_memory(device)


def model_identity(model: str, base: Base, parts: Sequence[str] = ("*",)) -> str:
    """A text that is the same where a model's files are, and another where they differ.

    Args:
        model: a folder, identified by the names, sizes and content of its files (of large ones,
            evenly spaced blocks); or a hub name, identified by that and the commit which the
            revision stands for.
        base: gives the variant, and the revision where the name has none.
        parts: patterns of the subfolders of a folder that matter.

    Raises:
        UserError: where the model is neither a folder nor to be had from the hub.
    """
    folder = Path(model)
    if not folder.is_dir():
        name, own = split_revision(model)
        return f"{name}@{_commit(name, own or base.revision)}:{base.variant}"
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
    return f"{digest.hexdigest()}:{base.variant}"


def _commit(name: str, revision: str | None) -> str:
    """The commit of a hub model's revision; without a connection, that of the local copy."""
    try:
        index = hf_hub_download(name, IFPipeline.config_name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The base model {name!r} is neither a folder nor to be had from the Hugging Face hub"
            f" ({_first_line(error)}): correct the name, or accept the model's licence on its page"
            " and log in with `hf auth login`."
        ) from error
    return Path(index).parent.name


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
