"""Adapters merged into a complete model's folder: ``python -m adapters.merge ADAPTER --out DIR``.

Plain diffusers, and whatever is built on it, loads the result with ``from_pretrained``.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from tqdm.auto import tqdm

from adapters.arguments import is_factor
from adapters.atomic import new_folder
from adapters.base.source import Source, sources_of
from adapters.base.stored_unet import StoredUNet
from adapters.errors import UserError, command_line
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.measure import check_weights_only
from adapters.merging.merged_model import MergedModel, Storage
from unets.precision import PRECISIONS

VARIANT = re.compile(r"[\w-]+")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a base's folder anew, with adapters merged into its UNet."""
    options = parser().parse_args(arguments)
    with command_line():
        places = merge(
            options.adapter,
            options.out,
            scales=options.scale,
            bases=options.base,
            stage=options.stage,
            storage=storage(options),
            revision=options.revision,
            variant=options.base_variant,
        )
    sys.stdout.write("".join(f"{place}\n" for place in places))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="adapters.merge",
        description="Merge adapters into a model's UNet, and write a folder that diffusers loads.",
    )
    add = parser.add_argument
    add("adapter", type=Path, nargs="+", help="exported folders, or other tools' files or folders")
    add("--out", type=Path, required=True, help="the new folder; of two stages, stage_1 ... in it")
    add(
        "--base",
        action="append",
        default=[],
        help="folder or owner/name[@revision], one a stage (adapter's own)",
    )
    add("--stage", type=int, choices=(1, 2), help="merge this stage only")
    add("--scale", type=float, action="append", help="how much of an adapter, one for each (1)")
    add("--dtype", choices=tuple(PRECISIONS), help="precision (the variant's, or else the base's)")
    add("--variant", help="name the UNet's files as this variant, such as fp16")
    add("--max-shard-size", default="5GB", help="of the UNet's files, and about the memory (5GB)")
    add(
        "--link",
        action="store_true",
        help="hard links to the files that do not change",
    )
    add("--revision", help="the base's hub revision (the adapter's own)")
    add("--base-variant", help="the variant of the base to read, such as fp16")
    return parser


def storage(options: argparse.Namespace) -> Storage:
    """How a command line wants the model to be written.

    Raises:
        UserError: where the variant is no such name.
    """
    variant = options.variant
    if variant is not None and not VARIANT.fullmatch(variant):
        raise UserError(f"--variant must be letters, digits, '-' and '_' (got {variant!r}).")
    own = variant if variant in PRECISIONS else None
    return Storage(options.dtype or own, variant, options.max_shard_size, options.link)


def merge(
    paths: Sequence[Path],
    out: Path,
    storage: Storage,
    *,
    scales: Sequence[float] | None = None,
    bases: Sequence[str] = (),
    stage: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> list[Path]:
    """Merge adapters into their base, in a new folder that appears once it is whole.

    The base's weights are read, merged and written one at a time. Each weight W becomes
    W + scale * (W merged - W), in float32 and rounded once, the same as in
    :meth:`adapters.Cascade.add_adapter`; adapters add up.

    Args:
        paths: exported folders, or other tools' files or folders.
        out: the new folder. One stage is written to it, two to ``stage_1`` and ``stage_2`` in it.
        storage: precision, names and sizes of the files.
        scales: how much of each adapter, or of all; ``None``: 1.
        bases: a model for each stage; without any, those that the adapters name.
        stage: merge this stage only; ``None``: all that have an adapter and a base.
        revision: the bases' hub revision; ``None``: the adapter's own.
        variant: the variant of the bases' weights.

    Returns:
        The folders of the models.

    Raises:
        UserError: where an adapter or a base cannot be read, or do not belong together, or where
            ``out`` is there already or cannot be written. Nothing is left behind then.
    """
    adapters = [StageAdapter.load_all(path) for path in paths]
    sources = sources_of(bases, revision, variant) or own_bases(adapters, revision, variant)
    sources = {number: s for number, s in sources.items() if stage in (None, number)}
    unets = {number: StoredUNet.of(source) for number, source in sources.items()}
    merged = staged(adapters, scale_of_each(scales, len(paths)), unets)
    models = {
        number: MergedModel(sources[number], unets[number], merged[number], storage)
        for number in sorted(merged)
    }
    if stage is None:
        say_left_out(adapters, unets)
    inside = {number: f"stage_{number}" if len(models) > 1 else "." for number in models}
    total = sum(model.new_bytes for model in models.values())
    with new_folder(out) as new:
        if (free := shutil.disk_usage(new).free) < total:
            raise UserError(
                f"{out} would take {tqdm.format_sizeof(total, 'B')} of disk, where"
                f" {tqdm.format_sizeof(free, 'B')} are free; free some, or use --link."
            )
        with tqdm(total=total, unit="B", unit_scale=True, desc="Merging", delay=1) as progress:
            for number, model in models.items():
                model.write(new / inside[number], progress.update)
    return [out / place for place in inside.values()]


def say_left_out(
    adapters: Sequence[Sequence[StageAdapter]], unets: Mapping[int, StoredUNet]
) -> None:
    """Tell which adapters have no base here."""
    configs = {number: unet.unet.config for number, unet in unets.items()}
    for adapter in chain.from_iterable(adapters):
        if (number := adapter.stage_among(configs)) not in unets:
            tqdm.write(
                f"{adapter.folder} is of Stage {number} and left out; name its base too (--base).",
                file=sys.stderr,
            )


def scale_of_each(scales: Sequence[float] | None, count: int) -> list[float]:
    """One scale for each of ``count`` adapters.

    Raises:
        UserError: where they are as many as neither one nor the adapters, or not finite in float32.
    """
    given = list(scales or [1.0])
    if len(given) not in (1, count) or not all(map(is_factor, given)):
        raise UserError(
            f"--scale must be a number for all adapters, or one for each of the {count}, in"
            " float32's range (got"
            f" {', '.join(map(str, given))})."
        )
    return given * (count // len(given))


def own_bases(
    adapters: Sequence[Sequence[StageAdapter]], revision: str | None, variant: str | None
) -> dict[int, Source]:
    """The bases that adapters name, by stage.

    Raises:
        UserError: where none names any.
    """
    infos = [adapter.info for stages in adapters for adapter in stages if adapter.info]
    if not infos:
        raise UserError("The adapters do not say on which base they were trained; name it, --base.")
    return {
        info.stage: Source(info.base_model, info.stage, revision or info.base_revision, variant)
        for info in reversed(infos)
    }


def staged(
    adapters: Sequence[Sequence[StageAdapter]],
    scales: Sequence[float],
    unets: Mapping[int, StoredUNet],
) -> dict[int, list[tuple[StageAdapter, float]]]:
    """Which adapters go into which stage, and how much of each.

    Raises:
        UserError: where one has none for these stages, or does not belong to the base.
    """
    configs = {number: unet.unet.config for number, unet in unets.items()}
    merged: dict[int, list[tuple[StageAdapter, float]]] = {}
    for stages, scale in zip(adapters, scales, strict=True):
        numbers = [adapter.stage_among(configs) for adapter in stages]
        if not set(numbers) & set(unets):
            raise UserError(
                f"{stages[0].folder} is an adapter of Stage {numbers[0]}, and there is no base of"
                " that stage to merge it into; name one (--base), or another --stage."
            )
        for number, adapter in zip(numbers, stages, strict=True):
            if number in unets:
                adapter.check_base(unets[number].signature, unets[number].name)
                check_weights_only(adapter)
                merged.setdefault(number, []).append((adapter, scale))
    return merged


if __name__ == "__main__":
    main()
