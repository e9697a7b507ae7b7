"""Adapters as LoRAs of a lower rank: `python -m adapters.resize ADAPTER --rank N --out DIR`."""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from adapters.atomic import new_folder
from adapters.base.source import sources_of
from adapters.base.stored_unet import StoredUNet
from adapters.errors import command_line
from adapters.files.export import approximate_info, write_adapter
from adapters.files.licence import find_copies
from adapters.files.model_card import write_card
from adapters.files.places import adapter_path
from adapters.files.reading import kind_of, lora_config, rank_of
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.measure import check_weights_only, needed_base, update
from adapters.tables import format_range, format_table
from adapters.weights.approximation import Approximation


def main(arguments: Sequence[str] | None = None) -> None:
    """Lower an adapter's rank, and say what that loses."""
    parser = argparse.ArgumentParser(prog="adapters.resize", description=__doc__)
    add = parser.add_argument
    add("adapter", type=Path, help="an exported folder, or another tool's file or folder")
    add("--rank", type=int, help="the largest rank that a module may have")
    add("--error", type=float, help="the relative error that each module may have, such as 0.1")
    add("--out", type=Path, required=True, help="the new folder")
    add("--base", action="append", default=[], help="the base, for kinds other than LoRA")
    add("--revision", help="the hub revision of the base")
    add("--variant", help="the variant of the base's weights, such as fp16")
    options = parser.parse_args(arguments)
    with command_line():
        sources = sources_of(options.base, options.revision, options.variant)
        bases = {stage: StoredUNet.of(source) for stage, source in sources.items()}
        told = resize(options.adapter, options.out, options.rank, options.error, bases=bases)
    sys.stdout.write(f"{told}\n")


def resize(
    path: Path,
    out: Path,
    rank: int | None = None,
    error: float | None = None,
    *,
    bases: Mapping[int, StoredUNet] | None = None,
) -> str:
    """Write adapters as LoRAs of a lower rank, by singular value decomposition of their updates.

    Args:
        path: an exported folder, of which all stages are resized, or another tool's adapter.
        out: the new folder; it is laid out as the old one.
        rank: the largest rank of a module.
        error: the relative Frobenius error of each module, 0 to 1: modules get the lowest rank that
            keeps it. At least one of the two must be given.
        bases: the bases by stage, which kinds other than LoRA need.

    Returns:
        What became of the ranks, and what was lost, for people.

    Raises:
        UserError: where the adapter or its base cannot be read or used, or ``out`` is there.
    """
    path = adapter_path(path)
    adapters = StageAdapter.load_all(path)
    limited = [Approximation.limited(rank, error) for _ in adapters]
    with new_folder(out) as new:
        resized = [
            (lowered(adapter, new, approximation, bases or {}), approximation)
            for adapter, approximation in zip(adapters, limited, strict=True)
        ]
        infos = [small.info for small, _ in resized if small.info is not None]
        for info in infos:
            for file in find_copies(path, info.stage):
                shutil.copyfile(file, new / file.name)
        if infos:
            write_card(new, infos)
    header = ["", "rank", "parameters", "relative error", "largest", "in"]
    rows = [
        [
            f"{old.folder}, {kind_of(old.config)}",
            f"{format_range(rank_of(old.config, name) for name in old.modules)}"
            f" -> {format_range(loss.ranks)}",
            f"{parameters(old)} -> {parameters(small)}",
            *(f"{loss.error:.2g}", f"{loss.worst[1]:.2g}", loss.worst[0]),
        ]
        for old, (small, loss) in zip(adapters, resized, strict=True)
    ]
    return f"{format_table([header, *rows])}\n{out}"


def lowered(
    adapter: StageAdapter,
    new: Path,
    approximation: Approximation,
    bases: Mapping[int, StoredUNet],
) -> StageAdapter:
    """Write the LoRA of a lower rank that is nearest to an adapter into a folder."""
    check_weights_only(adapter)
    base = needed_base(adapter, bases)
    for module in tqdm(adapter.modules, "Decomposing", delay=2, leave=False):
        change = update(adapter, module, base)
        assert change is not None
        approximation.add_update(module, change)
    info = adapter.info and approximate_info(adapter.info, approximation)
    small = StageAdapter(
        new / f"stage_{info.stage}" if info else new,
        info,
        lora_config(approximation.state),
        approximation.state,
    )
    write_adapter(small)
    return small


def parameters(adapter: StageAdapter) -> str:
    """How many parameters an adapter has."""
    return tqdm.format_sizeof(sum(tensor.numel() for tensor in adapter.state.values()))


if __name__ == "__main__":
    main()
