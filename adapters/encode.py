"""The command that encodes prompts: ``python -m adapters.encode MODEL --prompt P --out FILE``.

Encode on a machine with enough memory for the text encoder, then draw on one without.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from adapters.arguments import expand_home
from adapters.atomic import check_out
from adapters.command import command_parser, run_command
from unets.precision import automatic_precision

TEXT_PRECISIONS = ("fp32", "bf16", "int8", "nf4")
"""The precisions of a text encoder's weights; fp16 is missing because T5-XXL overflows in it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Encode prompts, and the empty prompt, which guidance needs."""
    parser = command_parser(
        "encode",
        "Encode prompts into a file for adapters.generate --embeds, which needs no text encoder.",
        'models/if-tiny/stage_1 --prompt "a sks dog" --out prompts.safetensors',
        *("--revision", "--variant", "--clean-caption"),
    )
    add = parser.add_argument
    add("model", help="Stage I, or Stage II with a text encoder of its own: folder or hub name")
    add("--prompt", action="append", required=True, help="a prompt to encode; may be repeated")
    help_ = "the file to write, such as prompts.safetensors"
    add("--out", type=expand_home, required=True, metavar="FILE", help=help_)
    help_ = "the precision of the weights (default: bf16 on a GPU, fp32 on a CPU)"
    add("--precision", choices=TEXT_PRECISIONS, help=help_)
    help_ = "the device, such as cuda or cpu (default: a GPU if there is one)"
    add("--device", default="auto", help=help_)
    parser.set_defaults(clean_caption=True)
    run_command(parser, arguments, _encode)


def _encode(options: argparse.Namespace) -> Path:
    import torch

    from adapters.arguments import find_device
    from adapters.base.source import source_of
    from adapters.cascade.embeds import save_embeds
    from adapters.progress import Bar
    from adapters.texts import KEEP_IN_PYTHON, check_captions, check_texts, check_vocabulary

    cleaning = {"clean_caption": options.clean_caption}
    check_out(options.out, "file")
    source = source_of(options.model, options.revision, options.variant)
    device = find_device(options.device)
    precision = options.precision or automatic_precision(device)
    prompts = dict.fromkeys([*options.prompt, ""], "the prompt")
    check_texts(prompts)
    check_captions(prompts, **cleaning, setting=KEEP_IN_PYTHON)
    check_vocabulary(prompts, source.tokenizer(), **cleaning)
    pipe = source.text_pipeline(precision, device)
    rows = [  # one by one, so that an encoding does not depend on the batch
        pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=device, **cleaning)[0]
        for prompt in Bar(prompts, "Encoding", delay=2)
    ]
    save_embeds(options.out, list(prompts), torch.cat(rows))
    return options.out


if __name__ == "__main__":
    main()
