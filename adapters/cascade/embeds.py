"""Text encodings as a file, for machines without room for the text encoder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.arguments import expand_home
from adapters.base.tensor_files import save_tensors
from adapters.errors import UserError, closest, first_line, quote
from adapters.files.validation import FLOATS

TENSOR = "prompt_embeds"
"""The name of the encodings in their file."""

PROMPTS = "prompts"
"""The entry of the file's header that holds the prompts, as a JSON list."""


def save_embeds(path: str | Path, prompts: Sequence[str], embeds: Tensor) -> None:
    """Write encodings and their prompts as one safetensors file.

    Args:
        path: the file to write.
        prompts: N texts; guidance needs the empty caption or a negative prompt among them.
        embeds: [N, T, D], as :meth:`Cascade.encode` returns them.

    Raises:
        UserError: if their numbers differ, or an encoding is not finite.

    Example:
        >>> prompts = ["a car on a pink background", ""]
        >>> save_embeds("car.safetensors", prompts, cascade.encode(prompts))
        >>> embeds = load_embeds("car.safetensors")
        >>> list(embeds)
        ['a car on a pink background', '']
        >>> few = Sampling(stage_1=StageSampling(steps=4), stage_2=StageSampling(steps=2))
        >>> cascade(prompts[0], embeds=embeds, sampling=few)
        CascadeImages(1 picture, 32 → 128 px, of 'a car on a pink background')
    """
    if len(prompts) != len(embeds):
        raise UserError(
            f"There must be one encoding for each of {len(prompts)} prompts (got {len(embeds)})."
        )
    header = {PROMPTS: json.dumps(list(prompts))}
    save_tensors(expand_home(path), {TENSOR: embeds}, header)


def load_embeds(path: str | Path) -> dict[str, Tensor]:
    """Read the encodings [T, D] of a file, by prompt, on the CPU.

    Raises:
        UserError: if the file is missing, or holds something else.
    """
    file = expand_home(path)
    try:
        if not file.is_file():  # opening a pipe would hang
            raise FileNotFoundError("there is no such file")
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            if PROMPTS not in header or TENSOR not in opened.keys():  # noqa: SIM118
                raise ValueError(f"it has no {PROMPTS!r} in its header, or no tensor {TENSOR!r}")
            prompts = json.loads(header[PROMPTS])
            if not isinstance(prompts, list) or not all(isinstance(each, str) for each in prompts):
                raise ValueError(f"its {PROMPTS!r} must be a list of texts (got {quote(prompts)})")
            embeds = opened.get_tensor(TENSOR)
        return dict(zip(prompts, embeds, strict=True))
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as text encodings ({first_line(error)}); make them with"
            " `python -m adapters.encode`."
        ) from error


def look_up(embeds: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
    """Look up the encodings of prompts, [N, T, D].

    Raises:
        UserError: if an encoding is missing (the message names the closest), has another shape or
            values that are not finite, or equals that of the empty caption, which means that
            cleaning has emptied its prompt.
    """
    if not isinstance(embeds, Mapping):
        raise UserError(
            f"embeds must be encodings by prompt (got {quote(embeds)}); read a file of them with"
            " load_embeds."
        )
    for prompt in prompts:
        if prompt not in embeds:
            known = [quote(text) for text in embeds]
            raise UserError(
                f"There is no encoding of {quote(prompt)} among those given; encode it too"
                f" ({closest(quote(prompt), known)})."
            )
    found = [embeds[prompt] for prompt in prompts]
    forms = dict.fromkeys(map(_describe, found))
    if len(forms) > 1 or not all(map(_is_encoding, found)):
        raise UserError(
            "Encodings must be floating-point tensors [tokens, width], all of one shape (found"
            f" {' and '.join(forms)}); make them with one text encoder."
        )
    for prompt in prompts:
        if not embeds[prompt].isfinite().all():
            raise UserError(
                f"The encoding of {quote(prompt)} has values that are not finite; encode it again"
                " without running T5 in fp16."
            )
    for prompt in filter(None, prompts):
        if "" in embeds and torch.equal(embeds[prompt], embeds[""]):
            raise UserError(
                f"The encoding of {quote(prompt)} is that of the empty caption, so cleaning has"
                " dropped all of its words; encode it with `python -m adapters.encode"
                " --no-clean-caption`."
            )
    return torch.stack([embeds[prompt] for prompt in prompts])


def _is_encoding(given: object) -> bool:
    if not isinstance(given, Tensor):
        return False
    return given.dtype in FLOATS and given.dim() == 2 and given.numel() > 0


def _describe(given: object) -> str:
    if not isinstance(given, Tensor):
        return type(given).__name__
    return f"{given.dtype} {list(given.shape)}"
