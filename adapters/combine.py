"""One LoRA of several: ``python -m adapters.combine A=0.7 B=0.5 --method svd --out C``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adapters.arguments import STAGES, available, by_stage, parse_scaled
from adapters.atomic import check_out
from adapters.errors import UserError, command_line
from adapters.files.export import save_adapters
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.combination import METHODS, Combination, Part, combined


def main(arguments: Sequence[str] | None = None) -> None:
    """Combine adapters stage by stage, and write the result."""
    options = parser().parse_args(arguments)
    with command_line():
        combine(options)
    sys.stdout.write(f"{options.out}\n")


def parser() -> argparse.ArgumentParser:
    """The command line; settings are those of :class:`adapters.merging.combination.Combination`."""
    parser = argparse.ArgumentParser(
        prog="adapters.combine", description="Combine LoRAs into one by a method of PEFT."
    )
    add = parser.add_argument
    help_ = "a folder or hub name and its scale (1), in all stages or by stage: A=0.7, A=1:0.5,2:1"
    add("adapters", nargs="+", metavar="FOLDER[=SCALE]", help=help_)
    add("--out", type=Path, required=True, help="the new folder")
    add("--method", choices=METHODS, default="linear", help="(linear)")
    add("--density", type=float, help="the share of values that ties, dare and magnitude keep")
    add("--rank", type=int, help="of methods by SVD (the largest of the adapters)")
    add("--majority-sign", choices=("total", "frequency"), help="of ties (total)")
    add("--seed", type=int, default=0, help="of the values that dare drops (0)")
    add("--stage", type=int, choices=STAGES, help="of adapters that do not say it themselves")
    add("--device", default="cpu", help="where to compute, such as cuda (cpu)")
    return parser


def combine(options: argparse.Namespace) -> None:
    """Combine and write.

    Raises:
        UserError: where an adapter cannot be read, belongs to another base than the others, says
            no stage, or cannot be combined.
    """
    how = Combination(
        options.method, options.density, options.rank, options.majority_sign, options.seed
    )
    stages: dict[int, list[Part]] = {}
    check_out(options.out, "new folder")
    for argument in options.adapters:
        folder, scale = parse_scaled(argument)
        own = {_stage(adapter, options.stage): adapter for adapter in StageAdapter.load_all(folder)}
        for stage, factor in by_stage(1.0 if scale is None else scale, own, STAGES, folder).items():
            if factor:
                stages.setdefault(stage, []).append(Part(folder, own[stage], factor))
    if not stages:
        raise UserError("There is nothing to combine; give adapters scales other than 0.")
    for parts in stages.values():
        _check_bases(parts)
    device = available(options.device)
    name = options.out.name
    save_adapters(
        {stage: combined(parts, how, name, device) for stage, parts in stages.items()}, options.out
    )


def _stage(adapter: StageAdapter, otherwise: int | None) -> int:
    stage = otherwise if adapter.info is None else adapter.info.stage
    if stage is None:
        raise UserError(f"{adapter.folder} does not say which stage it belongs to; give --stage.")
    return stage


def _check_bases(parts: Sequence[Part]) -> None:
    """Check that those adapters that say on which base they were trained say the same."""
    infos = [part.adapter.info for part in parts if part.adapter.info is not None]
    signed = [(info, info.base_signature) for info in infos if info.base_signature is not None]
    for info, signature in signed[1:]:
        first, base = signed[0]
        difference = signature.difference(base)
        if difference is not None:
            raise UserError(
                f"The Stage {info.stage} adapters were trained on different bases,"
                f" {first.base_model!r} and {info.base_model!r} ({difference}); combine those of"
                " one base."
            )


if __name__ == "__main__":
    main()
