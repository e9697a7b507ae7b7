"""Text encodings as a file: made where the text encoder is, used where there is none."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapters.atomic import replacing
from adapters.errors import UserError, closest

TENSOR = "prompt_embeds"
"""The name of the encodings in their file."""

PROMPTS = "prompts"
"""The entry of the file's header that holds the prompts, as a JSON list."""


def save_embeds(path: str | Path, prompts: Sequence[str], embeds: Tensor) -> None:
    """Write encodings, and what they encode, as one safetensors file.

    Args:
        path: where to.
        prompts: N; guidance needs the empty caption or a negative prompt too.
        embeds: [N, T, D], as :meth:`Cascade.encode` returns them.

    Raises:
        UserError: where there are more of one than of the other.

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
            f"The encodings must be one for each prompt, {len(prompts)} (got {len(embeds)})."
        )
    header = {PROMPTS: json.dumps(list(prompts))}
    with replacing(Path(path)) as temporary:
        save_file({TENSOR: embeds.cpu().contiguous()}, temporary, metadata=header)


def load_embeds(path: str | Path) -> dict[str, Tensor]:
    """The encodings [T, D] of a file, by prompt, on the CPU.

    Raises:
        UserError: where the file is not there, or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            prompts = json.loads((file.metadata() or {})[PROMPTS])
            embeds = file.get_tensor(TENSOR)
        return dict(zip(prompts, embeds, strict=True))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as text encodings ({type(error).__name__}: {error}); make them"
            " with `python -m adapters.encode`."
        ) from error


def look_up(embeds: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
    """The encodings of prompts, [N, T, D].

    Raises:
        UserError: where one is not there, naming the closest, is of another shape, or is that of
            the empty caption, as encodings of a prompt are that cleaning has emptied.
    """
    for prompt in prompts:
        if prompt not in embeds:
            known = [repr(text) for text in embeds]
            raise UserError(
                f"There is no encoding of {prompt!r} among those given; encode it too"
                f" ({closest(repr(prompt), known)})."
            )
    forms = dict.fromkeys(map(_describe, (embeds[prompt] for prompt in prompts)))
    if len(forms) > 1 or not all("float" in form and form.count(",") == 1 for form in forms):
        raise UserError(
            "Encodings must be floating-point numbers [tokens, width], all of one shape (found"
            f" {' and '.join(forms)}); make them with one text encoder."
        )
    for prompt in prompts:
        if not embeds[prompt].isfinite().all():
            raise UserError(
                f"The encoding of {prompt!r} has values that are not finite; encode it again, T5"
                " not in fp16."
            )
    for prompt in filter(None, prompts):
        if "" in embeds and torch.equal(embeds[prompt], embeds[""]):
            raise UserError(
                f"The encoding of {prompt!r} is that of the empty caption, so cleaning has dropped"
                " all of its words; encode it with `python -m adapters.encode --no-clean-caption`."
            )
    return torch.stack([embeds[prompt] for prompt in prompts])


def _describe(given: object) -> str:
    if not isinstance(given, Tensor):
        return type(given).__name__
    return f"{given.dtype} {list(given.shape)}"
