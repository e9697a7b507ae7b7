"""What an adapter is, and how strongly it acts where: `python -m adapters.inspect ADAPTER`."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from tqdm.auto import tqdm

from adapters.base.source import sources_of
from adapters.base.stored_unet import StoredUNet
from adapters.errors import command_line, listed
from adapters.files.for_diffusers import list_arriving
from adapters.files.info import AdapterInfo
from adapters.files.places import DIFFUSERS_WEIGHTS, find_weights
from adapters.files.reading import alpha_of, kind_of, rank_of
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.measure import by_block, inner, update
from adapters.tables import aligned, facts, span
from adapters.weights.kinds import KINDS

BAR = 24
"""How many characters the bar of the largest norm has."""

LORA_KINDS = [name for name, kind in KINDS.items() if kind.has_b]
"""The kinds that plain diffusers loads."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Tell what an adapter is, for people or for machines."""
    parser = argparse.ArgumentParser(prog="adapters.inspect", description=__doc__)
    add = parser.add_argument
    add("adapter", type=Path, help="an exported folder, or another tool's file or folder")
    add("--base", action="append", default=[], help="a base to compare with; one for each stage")
    add("--revision", help="the hub revision of the base")
    add("--variant", help="the variant of the base's weights, such as fp16")
    add("--json", action="store_true", help="for machines: everything, as a JSON list")
    options = parser.parse_args(arguments)
    with command_line():
        sources = sources_of(options.base, options.revision, options.variant)
        bases = {stage: StoredUNet.of(source) for stage, source in sources.items()}
        found = [described(adapter, bases) for adapter in StageAdapter.load_all(options.adapter)]
    text = json.dumps(found, indent=2) if options.json else "\n\n".join(map(readable, found))
    sys.stdout.write(f"{text}\n")


def described(adapter: StageAdapter, bases: Mapping[int, StoredUNet]) -> dict[str, Any]:
    """All there is to say of an adapter, in JSON's types.

    Args:
        adapter: of one stage.
        bases: what to hold it against, by stage; an adapter of another tool is held against all.

    Raises:
        UserError: where a base cannot be read.
    """
    info, modules = adapter.info, list(adapter.modules)
    base, difference = compared(adapter, bases)
    file = find_weights(adapter.folder)
    tensors = adapter.state.values()
    return {
        "file": str(file),
        "bytes": {path.name: path.stat().st_size for path in sorted(files_of(adapter, file))},
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "kind": kind_of(adapter.config),
        "ranks": {name: rank_of(adapter.config, name) for name in modules},
        "alphas": {name: alpha_of(adapter.config, name) for name in modules},
        "info": info and info.model_dump(mode="json", exclude={"base_signature"}),
        "for_diffusers": for_diffusers(adapter, file),
        "base": base and {"name": base.name, "matches": not difference, "difference": difference},
        **norms(adapter, None if difference else base),
    }


def compared(
    adapter: StageAdapter, bases: Mapping[int, StoredUNet]
) -> tuple[StoredUNet | None, str | None]:
    """The base of an adapter's stage, and in what it is not the one that it was trained on.

    An adapter that does not say on which base it was trained is compared by names and shapes, and
    one that does not say of which stage it is, with the base that it fits best.
    """
    if adapter.info is not None and adapter.info.base_signature is not None:
        own = bases.get(adapter.info.stage)
        return own, None if own is None else adapter.info.base_signature.difference(own.signature)
    misfits = {base.name: adapter.misfits(base.unet.config) for base in bases.values()}
    base = min(bases.values(), key=lambda base: len(misfits[base.name]), default=None)
    if base is None or not misfits[base.name]:
        return base, None
    return base, f"unknown, missing or of another shape: {listed(misfits[base.name], 4)}"


def files_of(adapter: StageAdapter, file: Path) -> list[Path]:
    """The files that an adapter consists of."""
    beside = adapter.folder.glob("*") if adapter.folder.is_dir() else ()
    return [path for path in beside if path.suffix in (".safetensors", ".json")] or [file]


def for_diffusers(adapter: StageAdapter, file: Path) -> dict[str, Any]:
    """What ``load_lora_weights`` makes of an adapter: how many tensors arrive, or in what stead."""
    stand_in = adapter.folder / DIFFUSERS_WEIGHTS
    own = stand_in if stand_in.is_file() else file
    if isinstance(adapter.config, LoraConfig):
        arrived = len(list_arriving(own, adapter.config, adapter.state))
        return {"file": own.name, "arriving": arrived, "approximation_error": None}
    info = StageAdapter.load(own).info
    error = info.approximation_error if info else None
    return {"file": own.name, "arriving": 0, "approximation_error": error}


def norms(adapter: StageAdapter, base: StoredUNet | None) -> dict[str, Any]:
    """The Frobenius norms, by block, of the updates, or else of the adapter's own parameters."""
    squares, weights, of = {}, {}, "update"
    for module, tensors in tqdm(adapter.modules.items(), "Measuring", delay=2, leave=False):
        change = update(adapter, module, base)
        if change is None:
            of = "parameters"
            squares[module] = sum(float(t.double().square().sum()) for t in tensors.values())
        else:
            squares[module] = inner(change, change)
        if base is not None:
            weights[module] = float(base.read(f"{module}.weight").double().square().sum())
    blocks = by_block(adapter.modules) | {"all": list(adapter.modules)}
    return {
        "norm_of": of,
        "blocks": [
            {
                "block": block,
                "modules": len(names),
                "norm": sum(squares[name] for name in names) ** 0.5,
                "relative": (
                    (sum(squares[n] for n in names) / sum(weights[n] for n in names)) ** 0.5
                    if weights
                    else None
                ),
            }
            for block, names in blocks.items()
        ],
    }


def readable(found: Mapping[str, Any]) -> str:
    """What :func:`described` has found, for people."""
    info = found["info"] and AdapterInfo.model_validate(found["info"], strict=False)
    rows = [
        ("base", base_of(info)),
        ("matches", matches(found["base"])),
        ("stage", str(info.stage) if info else "not said"),
        ("kind", found["kind"]),
        ("rank", span(found["ranks"].values())),
        ("alpha", span(found["alphas"].values())),
        ("targets", targets(info, found["ranks"])),
        *(trained(info) if info else []),
        ("diffusers", loaded_by_diffusers(found)),
        ("size", size(found)),
        ("prompts", "\n".join(info.prompts) if info else ""),
        ("licence", (info.licence_notice if info else None) or "that of its base"),
    ]
    parts = [f"{found['file']}\n{facts(rows)}", block_table(found)]
    if found["norm_of"] == "parameters":
        parts.append("What it adds to the weights can only be told with its base: name it, --base.")
    return "\n\n".join(parts + ([f"recipe\n{info.recipe.rstrip()}"] if info else []))


def base_of(info: AdapterInfo | None) -> str:
    """The base that an adapter names."""
    if info is None:
        return "not said: another tool wrote it"
    return info.base_model + f" at {info.base_revision}" * bool(info.base_revision)


def matches(base: Mapping[str, Any] | None) -> str:
    """Whether the base that an adapter was held against is its own."""
    if base is None:
        return "not compared; name a base of its stage with --base"
    return f"{base['name']}: " + ("yes" if base["matches"] else f"NO, {base['difference']}")


def trained(info: AdapterInfo) -> list[tuple[str, str]]:
    """How far an adapter was trained, when, and of what it is an approximation."""
    error = info.approximation_error
    of = "" if error is None else f"an adapter or a model, relative Frobenius error {error:.2g}"
    return [
        ("trained", f"{info.step} steps; exported {info.created} by version {info.version}"),
        ("approximates", of),
    ]


def targets(info: AdapterInfo | None, modules: Mapping[str, int]) -> str:
    """What an adapter adapts: the targets as they were asked for, or the endings of names."""
    endings = dict.fromkeys(name.removesuffix(".0").rpartition(".")[2] for name in modules)
    asked = info.spec.targets if info else tuple(endings)
    names = asked if isinstance(asked, str) else listed(asked)
    return f"{names} ({len(modules)} modules)"


def size(found: Mapping[str, Any]) -> str:
    """How large an adapter and its files are."""
    files = (f"{name} {tqdm.format_sizeof(count, 'B')}" for name, count in found["bytes"].items())
    return (
        f"{found['tensors']} tensors, {tqdm.format_sizeof(found['parameters'])} parameters,"
        f" {', '.join(found['dtypes'])}\n" + "\n".join(files)
    )


def loaded_by_diffusers(found: Mapping[str, Any]) -> str:
    """What plain diffusers loads, and what to do where that is not all."""
    loads, count = found["for_diffusers"], found["tensors"]
    if loads["arriving"] == count:
        return f"loads all of {loads['file']}"
    if loads["approximation_error"] is not None:
        error = f"relative Frobenius error {loads['approximation_error']:.2g}"
        return f"cannot load this kind, and gets {loads['file']}, a LoRA in its stead, {error}"
    if found["kind"] not in LORA_KINDS:
        return "cannot load this kind"
    return (
        f"loses {count - loads['arriving']} of the {count} tensors in {loads['file']}; python -m"
        " adapters.repair makes it whole"
    )


def block_table(found: Mapping[str, Any]) -> str:
    """The norms by block, with bars."""
    blocks = found["blocks"]
    relative = blocks[0]["relative"] is not None
    largest = max(row["norm"] for row in blocks[:-1]) or 1
    header = ["block", "modules", f"norm of {found['norm_of']}", *["of weights"] * relative, ""]
    rows = [
        [row["block"], str(row["modules"]), f"{row['norm']:.4g}"]
        + [f"{row['relative']:.2%}" for _ in range(relative)]
        + [("█" * round(BAR * row["norm"] / largest)).ljust(BAR) * (row is not blocks[-1])]
        for row in blocks
    ]
    return aligned(header, rows)


if __name__ == "__main__":
    main()
