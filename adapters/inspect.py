"""The command that describes an adapter: ``python -m adapters.inspect ADAPTER``."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from adapters.command import command_parser, format_report, run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Describe an adapter, for people or for programs."""
    parser = command_parser(
        "inspect",
        "Describe an adapter: its base and settings, and how strongly it acts in each block.",
        "runs/dog --base models/if-tiny",
        *("--base", "--revision", "--variant", "--json"),
    )
    help_ = "the folder of a run, an exported folder, another tool's file or folder, or a hub name"
    parser.add_argument("adapter", type=Path, help=help_)
    parser.add_argument("--recipe", action="store_true", help="print the recipe of its run too")
    run_command(parser, arguments, _inspect)


def _inspect(options: argparse.Namespace) -> str:
    from adapters.files.stage_adapter import StageAdapter
    from adapters.merging.inspection import format_inspection, inspect_adapter
    from adapters.merging.measure import find_bases

    bases = find_bases(options.base, options.revision, options.variant)
    found = [inspect_adapter(adapter, bases) for adapter in StageAdapter.load_all(options.adapter)]
    as_text = partial(format_inspection, with_recipe=options.recipe)
    return format_report(found, as_text, as_json=options.json)


if __name__ == "__main__":
    main()
