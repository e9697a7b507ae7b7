"""In what two adapters differ, or two models: `python -m adapters.diff A B`."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from adapters.base.component_files import CONFIG
from adapters.base.source import sources_of
from adapters.base.stored_unet import StoredUNet
from adapters.errors import UserError, command_line, listed
from adapters.files.reading import alpha_of, kind_of, rank_of
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.measure import Update, by_block, inner, needed_base, shape_of, update
from adapters.tables import format_facts, format_range, format_table

Read = Callable[[str], Update | None]
"""The update of a module by name, or a weight; ``None``: there is none."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare what two adapters of a stage do to its UNet, or two UNets themselves."""
    parser = argparse.ArgumentParser(prog="adapters.diff", description=__doc__)
    add = parser.add_argument
    add("a", type=Path, help="an exported folder, another tool's adapter, or a model's folder")
    add("b", type=Path, help="what to compare with it")
    add("--base", action="append", default=[], help="the base, for kinds other than LoRA")
    add("--revision", help="the hub revision of the base")
    add("--variant", help="the variant of the weights of the base, or of both models")
    add("--modules", action="store_true", help="a row for each module, instead of each block")
    add("--json", action="store_true", help="for machines: everything, as a JSON list")
    options = parser.parse_args(arguments)
    with command_line():
        if is_model(options.a) and is_model(options.b):
            a, b = (StoredUNet.find(str(p), None, options.variant) for p in (options.a, options.b))
            found = [compared_unets(a, b, options.modules)]
        else:
            sources = sources_of(options.base, options.revision, options.variant)
            bases = {stage: StoredUNet.of(source) for stage, source in sources.items()}
            pairs = paired(*(StageAdapter.load_all(path) for path in (options.a, options.b)))
            found = [compared_adapters(*pair, bases, options.modules) for pair in pairs]
    text = json.dumps(found, indent=2) if options.json else "\n\n".join(map(readable, found))
    sys.stdout.write(f"{text}\n")


def is_model(path: Path) -> bool:
    """Whether a path is a model's folder, or its UNet's."""
    return any((path / name).is_file() for name in (DiffusionPipeline.config_name, CONFIG))


def paired(
    a: Sequence[StageAdapter], b: Sequence[StageAdapter]
) -> list[tuple[StageAdapter, StageAdapter]]:
    """Adapters of the same stage; where one does not say its own, those with most in common.

    Raises:
        UserError: where there are none.
    """
    pairs = [(one, other) for one in a for other in b]
    if any(one.info is None or other.info is None for one, other in pairs):
        return [max(pairs, key=lambda pair: len(pair[0].modules.keys() & pair[1].modules.keys()))]
    same = [(x, y) for x, y in pairs if x.info and y.info and x.info.stage == y.info.stage]
    if not same:
        raise UserError(
            f"{a[0].folder} and {b[0].folder} are adapters of different stages; compare those of"
            " one stage."
        )
    return same


def compared_adapters(
    a: StageAdapter, b: StageAdapter, bases: Mapping[int, StoredUNet], by_module: bool
) -> dict[str, Any]:
    """In what two adapters of a stage differ, in JSON's types.

    Args:
        a: the one.
        b: the other, of any kind.
        bases: their base, by stage, which kinds other than LoRA need.
        by_module: a row for each module, instead of each block.

    Raises:
        UserError: where a base is needed and not given, or they are of UNets of different sizes.
    """
    both = [name for name in a.modules if name in b.modules]
    names = [*a.modules, *(name for name in b.modules if name not in a.modules)]
    ranks = {name: [rank_of(x.config, name) for x in (a, b)] for name in both}
    alphas = {name: [alpha_of(x.config, name) for x in (a, b)] for name in both}
    return {
        "a": headline(a),
        "b": headline(b),
        "only_in_a": [name for name in a.modules if name not in b.modules],
        "only_in_b": [name for name in b.modules if name not in a.modules],
        "ranks": {name: pair for name, pair in ranks.items() if pair[0] != pair[1]},
        "alphas": {name: pair for name, pair in alphas.items() if pair[0] != pair[1]},
        "rows": rows(names, reader(a, bases), reader(b, bases), by_module),
    }


def compared_unets(a: StoredUNet, b: StoredUNet, by_module: bool) -> dict[str, Any]:
    """In what the weights of two UNets differ, in JSON's types.

    Raises:
        UserError: where one cannot be read, or they are of another architecture.
    """
    architecture = a.signature.model_copy(update={"values": {}})
    if difference := architecture.difference(b.signature):
        raise UserError(
            f"{a.name} and {b.name} are UNets of another architecture ({difference}); compare two"
            " of one."
        )
    return {
        "a": f"{a.name}: {len(a.weights)} weights",
        "b": f"{b.name}: {len(b.weights)} weights",
        "rows": rows(list(a.weights), a.read, b.read, by_module),
    }


def headline(adapter: StageAdapter) -> str:
    """An adapter in a few words."""
    config, modules = adapter.config, adapter.modules
    alpha = format_range(alpha_of(config, name) for name in modules)
    rank = format_range(rank_of(config, name) for name in modules)
    return (
        f"{adapter.folder}: {kind_of(config)}, rank {rank}"
        + f", alpha {alpha}" * bool(alpha)
        + f", {len(modules)} modules"
    )


def reader(adapter: StageAdapter, bases: Mapping[int, StoredUNet]) -> Read:
    """What reads an adapter's updates by module."""
    base = needed_base(adapter, bases)
    return lambda name: update(adapter, name, base) if name in adapter.modules else None


@dataclass
class Products:
    """Inner products of updates A and B, summed over modules."""

    modules: int = 0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0

    def add(self, a: Update | None, b: Update | None) -> None:
        """Add a module's; ``None``: it has no such update."""
        self.modules += 1
        self.aa += 0.0 if a is None else inner(a, a)
        self.bb += 0.0 if b is None else inner(b, b)
        self.ab += 0.0 if a is None or b is None else inner(a, b)

    def row(self, name: str) -> dict[str, Any]:
        """Norms, distance relative to A's norm, and cosine; ``None`` where a norm is zero."""
        distance = max(self.aa + self.bb - 2 * self.ab, 0.0) ** 0.5
        return {
            "name": name,
            "modules": self.modules,
            "norm_a": self.aa**0.5,
            "norm_b": self.bb**0.5,
            "distance": distance / self.aa**0.5 if self.aa else None,
            "cosine": self.ab / (self.aa * self.bb) ** 0.5 if self.aa and self.bb else None,
        }


def rows(names: Sequence[str], a: Read, b: Read, by_module: bool) -> list[dict[str, Any]]:
    """The rows of the table: what differs most comes first, and all together last."""
    groups = {name: [name] for name in names} if by_module else by_block(names)
    found, whole = {group: Products() for group in groups}, Products()
    of = {name: group for group, members in groups.items() for name in members}
    for name in tqdm(names, "Comparing", delay=2, leave=False):
        one, other = a(name), b(name)
        if one is not None and other is not None and shape_of(one) != shape_of(other):
            raise UserError(
                f"{name} has the shape {shape_of(one)} in the one and {shape_of(other)} in the"
                " other; compare adapters of one base."
            )
        found[of[name]].add(one, other)
        whole.add(one, other)
    told = [products.row(group) for group, products in found.items()]
    told.sort(key=lambda row: float("inf") if row["distance"] is None else row["distance"])
    return [*reversed(told), whole.row("all")]


def readable(found: Mapping[str, Any]) -> str:
    """What has been found, for people."""
    lines = [("A", found["a"]), ("B", found["b"])]
    for side in "AB":
        if names := found.get(f"only_in_{side.lower()}"):
            lines.append((f"only in {side}", f"{len(names)} modules: {listed(names, 8)}"))
    for what in ("rank", "alpha"):
        if other := found.get(f"{what}s"):
            pairs = [
                f"{name} {format_range([one])} -> {format_range([two])}"
                for name, (one, two) in other.items()
            ]
            lines.append((what, f"differs in {len(other)} modules: {listed(pairs, 8)}"))
    header = ["", "modules", "|A|", "|B|", "|A - B| / |A|", "cosine"]
    columns = ("norm_a", "norm_b", "distance", "cosine")
    table = [
        [row["name"], str(row["modules"])]
        + ["-" if row[column] is None else f"{row[column]:.4g}" for column in columns]
        for row in found["rows"]
    ]
    return f"{format_facts(lines)}\n\n{format_table([header, *table])}"


if __name__ == "__main__":
    main()
