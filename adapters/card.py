"""The model card of an exported folder: what it is, how to load it, what it draws, its licence.

Export writes it; ``python -m adapters.card FOLDER`` writes it anew.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adapters.errors import command_line
from adapters.files.info import read_info
from adapters.files.model_card import load_samples, write_card
from adapters.files.places import export_stages


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a folder's card and its base's licence files anew; its sample pictures stay."""
    parser = argparse.ArgumentParser(prog="adapters.card", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="an exported folder")
    folder: Path = parser.parse_args(arguments).folder
    with command_line():
        infos = [read_info(stage) for stage in export_stages(folder)]
        sys.stdout.write(f"{write_card(folder, infos, load_samples(folder))}\n")


if __name__ == "__main__":
    main()
