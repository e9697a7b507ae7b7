"""The command that lowers an adapter's rank: ``python -m adapters.resize ADAPTER --rank N``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from adapters.command import command_parser, run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Lower an adapter's rank and print the error."""
    parser = command_parser(
        "resize",
        "Write an adapter of any kind as the nearest LoRA of a lower rank, and print its error.",
        "runs/dog --rank 4 --out small",
        *("--rank", "--error", "--out", "--base", "--revision", "--variant"),
    )
    help_ = "an exported folder, another tool's file or folder, or a hub name"
    parser.add_argument("adapter", type=Path, help=help_)
    run_command(parser, arguments, _resize)


def _resize(options: argparse.Namespace) -> str:
    from adapters.merging.low_rank import resize
    from adapters.merging.measure import find_bases

    bases = find_bases(options.base, options.revision, options.variant)
    return resize(options.adapter, options.out, options.rank, options.error, bases)


if __name__ == "__main__":
    main()
