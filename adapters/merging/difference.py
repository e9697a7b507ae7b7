"""Comparison of two adapters' effects on a UNet, or of two UNets."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from diffusers import DiffusionPipeline
from torch import Tensor

from adapters.base.configurations import CONFIG
from adapters.base.stored_unet import StoredUNet
from adapters.errors import UserError, listed
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.measure import (
    check_architecture,
    choose_base,
    group_by_block,
    inner,
    read_update,
    sum_by_group,
)
from adapters.progress import Bar
from adapters.tables import format_facts, format_range, format_table
from adapters.weights.updates import LowRank

Read: TypeAlias = Callable[[str], LowRank | Tensor | None]
"""A reader of a module's update, or of a weight, by name; ``None`` if it is missing."""


def is_model(path: Path) -> bool:
    """Tell whether a path is the folder of a model or of its UNet."""
    return any((path / name).is_file() for name in (DiffusionPipeline.config_name, CONFIG))


def pair_stages(
    a: Sequence[StageAdapter], b: Sequence[StageAdapter]
) -> list[tuple[StageAdapter, StageAdapter]]:
    """Pair adapters of one stage or, if any does not state its own, the two with most in common.

    Raises:
        UserError: if no two are of one stage.
    """
    pairs = [(one, other) for one in a for other in b]
    if any(each.info is None for each in (*a, *b)):
        return [max(pairs, key=lambda pair: len(pair[0].modules.keys() & pair[1].modules.keys()))]
    same = [(x, y) for x, y in pairs if x.info and y.info and x.info.stage == y.info.stage]
    if not same:
        raise UserError(
            f"{a[0].folder} and {b[0].folder} are adapters of different stages; compare those of"
            " one stage."
        )
    return same


def compare_adapters(
    a: StageAdapter, b: StageAdapter, bases: Mapping[int, StoredUNet], *, by_module: bool
) -> dict[str, Any]:
    """Compare two adapters of a stage, of any kinds, in JSON's types, by module or by block.

    Raises:
        UserError: if a base is needed and not given, or the UNets are of different sizes.
    """
    only = [[name for name in x.modules if name not in y.modules] for x, y in ((a, b), (b, a))]
    return {
        "a": _headline(a),
        "b": _headline(b),
        "only_in_a": only[0],
        "only_in_b": only[1],
        "ranks": _differing(a.ranks, b.ranks),
        "alphas": _differing(a.alphas, b.alphas),
        "rows": _compare([*a.modules, *only[1]], _reader(a, bases), _reader(b, bases), by_module),
    }


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Pair the settings of those modules in both whose settings differ."""
    return {name: [a[name], b[name]] for name in a if name in b and a[name] != b[name]}


def compare_unets(a: StoredUNet, b: StoredUNet, *, by_module: bool) -> dict[str, Any]:
    """Compare the weights of two UNets, in JSON's types.

    Raises:
        UserError: if one cannot be read, or they are of different architectures.
    """
    check_architecture(a, b)
    return {
        "a": f"{a.name}: {len(a.weights)} weights",
        "b": f"{b.name}: {len(b.weights)} weights",
        "rows": _compare(list(a.weights), a.read, b.read, by_module),
    }


def _headline(adapter: StageAdapter) -> str:
    rank, alpha = (format_range(own.values()) for own in (adapter.ranks, adapter.alphas))
    settings = f"rank {rank}" + f", alpha {alpha}" * bool(alpha)
    return f"{adapter.folder}: {adapter.kind}, {settings}, {len(adapter.modules)} modules"


def _reader(adapter: StageAdapter, bases: Mapping[int, StoredUNet]) -> Read:
    base = choose_base(adapter, bases)
    return lambda name: read_update(adapter, name, base) if name in adapter.modules else None


def _compare(names: Sequence[str], a: Read, b: Read, by_module: bool) -> list[dict[str, Any]]:
    """Build the rows of the table: largest differences first, and the sum of all last."""
    products = {}
    for name in Bar(names, "Comparing", delay=2, leave=False):
        one, other = a(name), b(name)
        if one is not None and other is not None and one.shape != other.shape:
            shapes = [list(update.shape) for update in (one, other)]
            raise UserError(
                f"{name} has the shape {shapes[0]} in the one and {shapes[1]} in the other; compare"
                " adapters of one base."
            )
        products[name] = [
            0.0 if x is None or y is None else inner(x, y)
            for x, y in ((one, one), (other, other), (one, other))
        ]
    groups = {name: [name] for name in names} if by_module else group_by_block(names)
    *rows, whole = (_row(*sums) for sums in sum_by_group(groups, products))
    rows.sort(
        key=lambda row: float("inf") if row["distance"] is None else row["distance"], reverse=True
    )
    return [*rows, whole]


def _row(name: str, modules: int, products: Sequence[float]) -> dict[str, Any]:
    """Compute norms, distance relative to A's norm, and cosine; ``None`` if a norm is zero."""
    aa, bb, ab = products
    distance = max(aa + bb - 2 * ab, 0.0) ** 0.5
    return {
        "name": name,
        "modules": modules,
        "norm_a": aa**0.5,
        "norm_b": bb**0.5,
        "distance": distance / aa**0.5 if aa else None,
        "cosine": ab / (aa * bb) ** 0.5 if aa and bb else None,
    }


def format_comparison(found: Mapping[str, Any]) -> str:
    """Lay out a comparison as text."""
    facts = [("A", found["a"]), ("B", found["b"])]
    for side in "AB":
        if names := found.get(f"only_in_{side.lower()}"):
            facts.append((f"only in {side}", f"{len(names)} modules: {listed(names, 8)}"))
    for setting in ("rank", "alpha"):
        if pairs := found.get(f"{setting}s"):
            changes = [
                f"{name} {' -> '.join(format_range([value]) for value in pair)}"
                for name, pair in pairs.items()
            ]
            facts.append((setting, f"differs in {len(pairs)} modules: {listed(changes, 8)}"))
    table = [["", "modules", "|A|", "|B|", "|A - B| / |A|", "cosine"]]
    for name, modules, *values in (row.values() for row in found["rows"]):
        table.append([name, str(modules), *("-" if v is None else f"{v:.4g}" for v in values)])
    return f"{format_facts(facts)}\n\n{format_table(table)}"
