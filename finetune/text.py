"""Text encodings of captions: each made once, by the pipeline's own text path, and kept on disk."""

import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import IFPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, T5EncoderModel

from adapters.errors import UserError
from adapters.files import replacing
from finetune.data import Picture, has_captions, load_captions
from finetune.recipe import Base, Data, Recipe

TEXT_PARTS = ("text_encoder", "tokenizer")
"""The subfolders of a model that decide on its text encodings."""

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.bfloat16,
    "nf4": torch.bfloat16,
}
"""The precision of what is not quantised, and of the encodings."""

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
}
"""The bitsandbytes settings of the quantised precisions."""

HASHED_BYTES = 2**20
"""How much is hashed of each end of a model's file."""


def embed_captions(
    captions: Iterable[str], recipe: Recipe, device: torch.device
) -> dict[str, Tensor]:
    """The text encoding of each distinct caption, [T, D] on the CPU, in the encoder's precision.

    Bit for bit what ``IFPipeline.__call__`` makes of the caption: each is encoded by itself, so its
    encoding does not depend on its company. The text encoder is loaded only where the cache lacks
    a caption, and is gone from memory when this returns.

    Args:
        captions: plain captions; cleaning them is part of the text path.
        recipe: its ``base``, ``text`` and ``cache_dir``.
        device: the training device.

    Raises:
        UserError: where the base model cannot be read.
    """
    cache = CaptionCache(recipe, device)
    embeds = {caption: cache.read(caption) for caption in sorted(set(captions))}
    missing = [caption for caption, encoding in embeds.items() if encoding is None]
    if missing:
        with text_pipeline(recipe, cache.precision, cache.device) as pipeline:
            for caption in tqdm(missing, "Encoding captions", delay=2):
                encoding, _ = pipeline.encode_prompt(
                    caption,
                    do_classifier_free_guidance=False,
                    device=cache.device,
                    clean_caption=recipe.text.clean_caption,
                )
                embeds[caption] = cache.write(caption, encoding[0])
    return {caption: encoding for caption, encoding in embeds.items() if encoding is not None}


def captions_of(recipe: Recipe, pictures: Iterable[Picture]) -> list[str]:
    """All distinct captions that a run needs, sorted; the empty caption is one of them."""
    captions = {"", *(picture.caption for picture in pictures), *recipe.validation.prompts}
    if recipe.prior:
        captions.update(recipe.prior.prompts)
        if recipe.prior.folder and has_captions(Path(recipe.prior.folder)):
            captions.update(load_captions(Data(source=recipe.prior.folder), recipe.cache))
    if recipe.comparison:
        captions.update(recipe.comparison.prompts, recipe.comparison.other_prompts)
    return sorted(captions)


class CaptionCache:
    """The encodings on disk: one file a caption, named by all that decides on its content."""

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

    def read(self, caption: str) -> Tensor | None:
        """A caption's encoding [T, D]; ``None`` where it is missing or its file is damaged."""
        try:
            return load_file(self.path(caption))["prompt_embeds"]
        except (OSError, KeyError, SafetensorError):
            return None

    def write(self, caption: str, encoding: Tensor) -> Tensor:
        """Keep a caption's encoding [T, D]; returns it on the CPU."""
        encoding = encoding.cpu().contiguous()
        with replacing(self.path(caption)) as temporary:
            save_file({"prompt_embeds": encoding}, temporary)
        return encoding


@contextmanager
def text_pipeline(recipe: Recipe, precision: str, device: torch.device) -> Iterator[IFPipeline]:
    """Stage I's pipeline with its text encoder and tokenizer alone, which is freed afterwards.

    It draws no pictures, so the components that guard pictures are not loaded either.
    """
    base = recipe.base
    quantization = QUANTIZATIONS.get(precision)
    try:
        text_encoder = T5EncoderModel.from_pretrained(
            base.stage_1,
            subfolder="text_encoder",
            revision=base.revision,
            variant=base.variant,
            dtype=DTYPES[precision],
            quantization_config=BitsAndBytesConfig(**quantization) if quantization else None,
            device_map={"": device},
            use_safetensors=True,
        )
        pipeline = IFPipeline.from_pretrained(
            base.stage_1,
            text_encoder=text_encoder,
            unet=None,
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
            revision=base.revision,
            variant=base.variant,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"The text encoder of base.stage_1 {base.stage_1!r} cannot be loaded"
            f" ({_first_line(error)}): give a model in diffusers' layout with safetensors weights."
        ) from error
    try:
        yield pipeline
    finally:
        pipeline.register_modules(text_encoder=None)
        del pipeline, text_encoder
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def model_identity(model: str, base: Base, parts: Sequence[str] = ("*",)) -> str:
    """A text that is the same exactly where a model's files are.

    Args:
        model: a folder, identified by names, sizes and both ends of its files; or a hub name,
            identified by that and the commit which the revision stands for.
        base: gives the revision and the variant.
        parts: patterns of the subfolders of a folder that matter.

    Raises:
        UserError: where the model is neither a folder nor to be had from the hub.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{_commit(model, base.revision)}:{base.variant}"
    digest = hashlib.sha256()
    files = {file for part in parts for file in folder.glob(f"{part}/*") if file.is_file()}
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"\n{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(HASHED_BYTES))
            stream.seek(max(0, size - HASHED_BYTES))
            digest.update(stream.read(HASHED_BYTES))
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
