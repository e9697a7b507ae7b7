"""The command that combines LoRAs into one: ``python -m adapters.combine A=0.7 B=0.5``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from adapters.arguments import find_device, parse_scaled
from adapters.atomic import check_out
from adapters.command import command_parser, run_command
from adapters.merging.methods import METHODS, Combination


def main(arguments: Sequence[str] | None = None) -> None:
    """Combine adapters stage by stage, and write the result."""
    parser = command_parser(
        "combine",
        "Combine LoRAs into one with one of PEFT's methods.",
        "runs/dog=0.7 runs/style=0.5 --method svd --out both",
        *("--out", "--stage", "--device"),
    )
    add = parser.add_argument
    help_ = "a folder or hub name, with its scale: A, A=0.7 or by stage A=1:0.5,2:1 (default: 1)"
    add("adapters", nargs="+", metavar="FOLDER[=SCALE]", help=help_)
    add("--method", choices=METHODS, default="linear", help="PEFT's method (default: linear)")
    add("--density", type=float, help="the share of values that ties, dare and magnitude keep")
    help_ = "the result's rank, for methods by SVD (default: the adapters' largest)"
    add("--rank", type=int, help=help_)
    help_ = "how ties elects a sign (default: total)"
    add("--majority-sign", choices=("total", "frequency"), help=help_)
    help_ = "the seed that chooses the values that dare drops (default: 0)"
    add("--seed", type=int, default=0, help=help_)
    run_command(parser, arguments, _combine)


def _combine(options: argparse.Namespace) -> Path:
    out = options.out
    how = Combination(
        options.method, options.density, options.rank, options.majority_sign, options.seed
    )
    check_out(out, "new folder")
    parsed = map(parse_scaled, options.adapters)
    adapters = [(folder, 1.0 if scale is None else scale) for folder, scale in parsed]

    from adapters.files.export import save_adapters
    from adapters.merging.combination import combine, load_parts

    stages = load_parts(adapters, options.stage)
    device = find_device(options.device)
    results = {stage: combine(parts, how, out.name, device) for stage, parts in stages.items()}
    save_adapters(results, out)
    return out


if __name__ == "__main__":
    main()
