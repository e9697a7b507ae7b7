"""The command that rewrites an export's model card: ``python -m adapters.card FOLDER``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from adapters.command import command_parser, run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite a folder's card and its base's licence files; its sample pictures stay."""
    parser = command_parser(
        "card",
        "Write an export's model card and its base's licence files again; its pictures stay.",
        "runs/dog",
    )
    parser.add_argument(
        "folder", type=Path, help="the folder of a finished run, or an exported one"
    )
    run_command(parser, arguments, _write)


def _write(options: argparse.Namespace) -> Path:
    from adapters.files.info import read_info
    from adapters.files.model_card import load_samples, write_card
    from adapters.files.places import export_of, export_stages

    folder = export_of(options.folder)
    infos = [read_info(stage) for stage in export_stages(folder)]
    return write_card(folder, infos, load_samples(folder))


if __name__ == "__main__":
    main()
