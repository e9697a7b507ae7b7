"""Description of an adapter: its origin, settings, files, and its strength in each block."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from torch import Tensor
from tqdm.auto import tqdm

from adapters.base.stored_unet import StoredUNet
from adapters.errors import listed
from adapters.files.for_diffusers import list_arriving
from adapters.files.info import AdapterInfo
from adapters.files.places import find_weights
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.measure import group_by_block, inner, read_update, sum_by_group
from adapters.progress import Bar
from adapters.tables import format_facts, format_range, format_table
from adapters.weights.kinds import KINDS

BAR = 24
"""The width in characters of the bar of the largest norm."""


def inspect_adapter(adapter: StageAdapter, bases: Mapping[int, StoredUNet]) -> dict[str, Any]:
    """Describe an adapter in JSON's types, and compare it with the base of its stage, if any."""
    info, tensors = adapter.info, adapter.state.values()
    base, difference = _compare_base(adapter, bases)
    file = find_weights(adapter.folder)
    beside = adapter.folder.glob("*") if adapter.folder.is_dir() else ()
    files = [path for path in beside if path.suffix in (".safetensors", ".json")] or [file]
    return {
        "file": str(file),
        "bytes": {path.name: path.stat().st_size for path in sorted(files)},
        "tensors": len(tensors),
        "parameters": adapter.parameters,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "kind": adapter.kind,
        "ranks": adapter.ranks,
        "alphas": adapter.alphas,
        "info": info and info.model_dump(mode="json", exclude={"base_signature"}),
        "for_diffusers": _load_by_diffusers(adapter, file),
        "base": base and {"name": base.name, "matches": not difference, "difference": difference},
        **_measure_norms(adapter, None if difference else base),
    }


def _compare_base(
    adapter: StageAdapter, bases: Mapping[int, StoredUNet]
) -> tuple[StoredUNet | None, str | None]:
    """Find the base of an adapter's stage, and how it differs from the one it was trained on.

    An adapter that does not state the base it was trained on is compared by names and shapes, with
    the base that it fits best.
    """
    if adapter.info is not None and adapter.info.base_signature is not None:
        own = bases.get(adapter.info.stage)
        return own, None if own is None else adapter.info.base_signature.difference(own.signature)
    misfits = {stage: adapter.misfits(base.unet.config) for stage, base in bases.items()}
    stage = min(misfits, key=lambda stage: len(misfits[stage]), default=None)
    if stage is None or not misfits[stage]:
        return None if stage is None else bases[stage], None
    return bases[stage], f"unknown, missing or of another shape: {listed(misfits[stage], 4)}"


def _load_by_diffusers(adapter: StageAdapter, file: Path) -> dict[str, Any]:
    """Tell which file ``load_lora_weights`` reads, and how many of its tensors arrive."""
    exported = adapter.folder / LORA_WEIGHT_NAME_SAFE
    own = exported if exported.is_file() else file
    if isinstance(adapter.config, LoraConfig):
        arrived, error = len(list_arriving(own, adapter.config, adapter.state)), None
    else:
        info = StageAdapter.load(own).info
        arrived, error = 0, info and info.approximation_error
    return {"file": own.name, "arriving": arrived, "approximation_error": error}


def _measure_norms(adapter: StageAdapter, base: StoredUNet | None) -> dict[str, Any]:
    """Measure the Frobenius norms of updates, or else of the adapter's parameters, by block."""
    squares, of = {}, "update"
    for module, tensors in Bar(adapter.modules.items(), "Measuring", delay=2, leave=False):
        if (update := read_update(adapter, module, base)) is not None:
            own = inner(update, update)
        else:
            own, of = sum(map(_square, tensors.values())), "parameters"
        squares[module] = own, _square(base.read(f"{module}.weight")) if base else 0.0
    blocks = [
        {
            "block": block,
            "modules": count,
            "norm": own**0.5,
            "relative": (own / weight) ** 0.5 if base else None,
        }
        for block, count, (own, weight) in sum_by_group(group_by_block(adapter.modules), squares)
    ]
    return {"norm_of": of, "blocks": blocks}


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def format_inspection(found: Mapping[str, Any], *, with_recipe: bool = False) -> str:
    """Lay out the result of :func:`inspect_adapter` as text, with the recipe of its run or not."""
    info = found["info"] and AdapterInfo.model_validate(found["info"], strict=False)
    named, training, prompts, error = "unknown: written by another tool", "", "", None
    if info:
        named = info.base_model + f" at {info.base_revision}" * bool(info.base_revision)
        when = f" {info.created}" * bool(info.created)
        training = f"{info.step} steps; exported{when} by version {info.version}"
        prompts, error = "\n".join(info.prompts), info.approximation_error
    match = "not compared; name a base of its stage with --base"
    if base := found["base"]:
        match = f"{base['name']}: " + ("yes" if base["matches"] else f"NO, {base['difference']}")
    rows = [
        ("base", named),
        ("matches", match),
        ("stage", str(info.stage) if info else "unknown"),
        ("kind", found["kind"]),
        ("rank", format_range(found["ranks"].values())),
        ("alpha", format_range(found["alphas"].values())),
        ("targets", _format_targets(info, found["ranks"])),
        ("trained", training),
        ("sampling", _format_sampling(info)),
        ("approximates", "" if error is None else f"an adapter or a model, {_format_error(error)}"),
        ("diffusers", _format_loading(found)),
        ("size", _format_size(found)),
        ("prompts", prompts),
        ("licence", (info and info.licence_notice) or "that of its base"),
    ]
    parts = [f"{found['file']}\n{format_facts(rows)}", _format_blocks(found)]
    if found["norm_of"] == "parameters":
        parts.append("Its updates depend on its base; name the base with --base to measure them.")
    if info:
        lines = info.recipe.rstrip().splitlines()
        below = (
            "\n".join(["", *lines])
            if with_recipe
            else f": {len(lines)} lines; --recipe prints them"
        )
        parts.append(f"recipe{below}")
    return "\n\n".join(parts)


def _format_sampling(info: AdapterInfo | None) -> str:
    """Write the settings that its stage was validated with."""
    settings = ((info and info.sampling) or {}).get(f"stage_{info.stage}" if info else "", {})
    given = {name.replace("_", " "): value for name, value in settings.items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in given.items())


def _format_targets(info: AdapterInfo | None, modules: Mapping[str, int]) -> str:
    """Name the targets as the recipe gave them, or else the endings of the modules' names."""
    endings = dict.fromkeys(name.removesuffix(".0").rpartition(".")[2] for name in modules)
    asked = info.spec.targets if info else tuple(endings)
    names = asked if isinstance(asked, str) else listed(asked)
    return f"{names} ({len(modules)} modules)"


def _format_error(error: float) -> str:
    return f"relative Frobenius error {error:.2g}"


def _format_loading(found: Mapping[str, Any]) -> str:
    """Say what plain diffusers loads, and what to do if that is not all."""
    loads, count = found["for_diffusers"], found["tensors"]
    lost, error = count - loads["arriving"], loads["approximation_error"]
    if not lost:
        return f"loads all of {loads['file']}"
    if error is not None:
        return f"loads {loads['file']}, a LoRA that approximates it, {_format_error(error)}"
    if found["kind"] not in KINDS or not KINDS[found["kind"]].has_b:
        return "cannot load this kind"
    return (
        f"loses {lost} of the {count} tensors in {loads['file']}; python -m adapters.repair writes"
        " a file that it loads whole"
    )


def _format_size(found: Mapping[str, Any]) -> str:
    size = tqdm.format_sizeof
    files = [f"{name} {size(count, 'B')}" for name, count in found["bytes"].items()]
    parameters, dtypes = size(found["parameters"]), ", ".join(found["dtypes"])
    return "\n".join([f"{found['tensors']} tensors, {parameters} parameters, {dtypes}", *files])


def _format_blocks(found: Mapping[str, Any]) -> str:
    """Lay out the norms by block, with bars."""
    *blocks, whole = found["blocks"]
    relative = whole["relative"] is not None
    largest = max(row["norm"] for row in blocks) or 1
    rows = [["block", "modules", f"norm of {found['norm_of']}", *["of weights"] * relative, ""]]
    for row in found["blocks"]:
        bar = "" if row is whole else "█" * round(BAR * row["norm"] / largest)
        share = [f"{row['relative']:.2%}"] if relative else []
        norm = f"{row['norm']:.4g}"
        rows.append([row["block"], str(row["modules"]), norm, *share, bar.ljust(BAR)])
    return format_table(rows)
