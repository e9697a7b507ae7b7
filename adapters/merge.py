"""The command that merges adapters into a complete model: ``python -m adapters.merge ADAPTER``.

Plain diffusers, and tools built on it, load the result with ``from_pretrained``.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from adapters.command import command_parser, run_command
from adapters.errors import UserError
from unets.precision import PRECISIONS

VARIANT = re.compile(r"[\w-]+")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a copy of a base's folder with adapters merged into its UNet."""
    parser = command_parser(
        "merge",
        "Merge adapters into a model's UNet, and write a complete folder that diffusers loads.",
        "runs/dog --scale 0.8 --variant fp16 --out merged",
        *("--out", "--base", "--revision"),
    )
    add = parser.add_argument
    add("adapter", type=Path, nargs="+", help="exported folders, or other tools' files or folders")
    add("--stage", type=int, choices=(1, 2), help="merge this stage only")
    help_ = "the adapters' scale (default: 1); repeat it to give each adapter its own"
    add("--scale", type=float, action="append", help=help_)
    help_ = "the precision to write (default: the variant's, or else the base's)"
    add("--dtype", choices=PRECISIONS, help=help_)
    add("--variant", help="the variant to name the UNet's files after, such as fp16")
    help_ = "the largest size of a file of the UNet (default: 5GB)"
    add("--max-shard-size", default="5GB", help=help_)
    help_ = "make hard links to the base's unchanged files instead of copies"
    add("--link", action="store_true", help=help_)
    add("--base-variant", help="the variant of the base to read, such as fp16")
    run_command(parser, arguments, _merge)


def _merge(options: argparse.Namespace) -> str:
    variant = options.variant
    if variant is not None and not VARIANT.fullmatch(variant):
        raise UserError(f"--variant must be letters, digits, '-' and '_' (got {variant!r}).")

    from adapters.merging.merged_model import Storage, merge

    precision = options.dtype or (variant if variant in PRECISIONS else None)
    places = merge(
        options.adapter,
        options.out,
        Storage(precision, variant, options.max_shard_size, options.link),
        scales=options.scale,
        bases=options.base,
        stage=options.stage,
        revision=options.revision,
        variant=options.base_variant,
    )
    return "\n".join(map(str, places))


if __name__ == "__main__":
    main()
