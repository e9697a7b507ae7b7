"""Encode prompts where the text encoder fits, to draw them where it does not.

python -m adapters.encode MODEL --prompt "a sks dog" --prompt "a sks dog on a beach" --out FILE
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from adapters.arguments import available
from adapters.atomic import check_out
from adapters.base.source import Source, source_of
from adapters.cascade.embeds import save_embeds
from adapters.errors import command_line
from adapters.texts import KEEP_IN_PYTHON, check_captions, check_texts, check_vocabulary
from unets.loading import automatic_precision

TEXT_PRECISIONS = ("fp32", "bf16", "int8", "nf4")
"""What a text encoder's weights are kept in; in fp16 T5-XXL overflows."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; the empty caption, which guidance needs, is encoded too."""
    options = parser().parse_args(arguments)
    prompts = list(dict.fromkeys([*options.prompt, ""]))
    with command_line():
        check_out(options.out, "file")
        source = source_of(options.model, options.revision, options.variant)
        device = available(options.device or "auto")
        precision = options.precision or automatic_precision(device)
        clean_caption = options.clean_caption
        embeds = encode(source, prompts, precision, device, clean_caption=clean_caption)
        save_embeds(options.out, prompts, embeds)
    sys.stdout.write(f"{options.out}\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="adapters.encode", description="Encode prompts for adapters.generate --embeds."
    )
    add = parser.add_argument
    add("model", help="Stage I, or Stage II with a text encoder of its own: folder or hub name")
    add("--prompt", action="append", required=True, help="what to encode; may be repeated")
    add("--out", type=Path, required=True, help="the file to write, such as prompts.safetensors")
    help_ = "clean prompts as IF's pipelines do; drops <sks>, j0hn, #3 and all Chinese (clean)"
    add("--clean-caption", action=argparse.BooleanOptionalAction, default=True, help=help_)
    add("--precision", choices=TEXT_PRECISIONS, help="the weights' (bf16 on a GPU, fp32 on a CPU)")
    add("--device", help="such as cuda or cpu (the GPU where there is one)")
    add("--revision", help="the model's hub revision")
    add("--variant", help="the weights' variant, such as fp16")
    return parser


def encode(
    source: Source,
    prompts: Sequence[str],
    precision: str,
    device: torch.device,
    *,
    clean_caption: bool = True,
) -> Tensor:
    """The encodings of prompts along the path of ``IFPipeline.__call__``, [N, T, D].

    Args:
        source: Stage I or II; no more of it is loaded than its text encoder.
        prompts: N, encoded one by one, so that an encoding does not depend on its company.
        precision: one of :data:`TEXT_PRECISIONS`.
        device: where to encode.
        clean_caption: clean prompts as IF's pipelines do by default.

    Raises:
        UserError: where the model has no text encoder or cannot be loaded, or where cleaning
            empties a prompt.
    """
    check_texts(prompts)
    captions = dict.fromkeys(prompts, "the prompt")
    check_captions(captions, clean_caption=clean_caption, setting=KEEP_IN_PYTHON)
    check_vocabulary(captions, source.tokenizer(), clean_caption=clean_caption)
    pipe = source.text_pipeline(precision, device)
    options = {"do_classifier_free_guidance": False, "device": device}
    rows = [
        pipe.encode_prompt(prompt, **options, clean_caption=clean_caption)[0]
        for prompt in tqdm(prompts, "Encoding", delay=2)
    ]
    return torch.cat(rows)


if __name__ == "__main__":
    main()
