"""The command that compares two adapters or models: ``python -m adapters.diff A B``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from adapters.command import command_parser, format_report, run_command
from adapters.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare what two adapters of a stage do to its UNet, or two UNets."""
    parser = command_parser(
        "diff",
        "Compare what two adapters of a stage do to its UNet, or the UNets of two models.",
        "runs/dog runs/cat --modules",
        *("--base", "--revision", "--variant", "--json"),
    )
    add = parser.add_argument
    add("a", type=Path, help="an exported folder, another tool's adapter, or a model's folder")
    add("b", type=Path, help="what to compare with it")
    add("--modules", action="store_true", help="a row for each module, instead of each block")
    run_command(parser, arguments, _diff)


def _diff(options: argparse.Namespace) -> str:
    from adapters.base.stored_unet import StoredUNet
    from adapters.files.stage_adapter import StageAdapter
    from adapters.merging import difference
    from adapters.merging.measure import find_bases

    paths = (options.a, options.b)
    models = [path for path in paths if difference.is_model(path)]
    if len(models) == 1:
        raise UserError(
            f"{models[0]} is a model, and the other is not; compare two adapters or two models."
        )
    if models:
        a, b = (StoredUNet.find(str(path), None, options.variant) for path in paths)
        found = [difference.compare_unets(a, b, by_module=options.modules)]
    else:
        bases = find_bases(options.base, options.revision, options.variant)
        found = [
            difference.compare_adapters(a, b, bases, by_module=options.modules)
            for a, b in difference.pair_stages(*(StageAdapter.load_all(path) for path in paths))
        ]
    return format_report(found, difference.format_comparison, as_json=options.json)


if __name__ == "__main__":
    main()
