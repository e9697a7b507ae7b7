"""Writing LoRAs of a low rank: of an adapter of any kind, and of the difference of two UNets."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm

from adapters.atomic import check_out, new_folder
from adapters.base.source import Source
from adapters.base.stored_unet import StoredUNet
from adapters.errors import UserError, __version__, listed
from adapters.files.export import approximate_info, complete_info, write_adapter
from adapters.files.info import AdapterInfo
from adapters.files.licence import find_copies
from adapters.files.model_card import write_card
from adapters.files.places import adapter_path
from adapters.files.reading import lora_config
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.measure import (
    check_architecture,
    check_weights_only,
    choose_base,
    read_update,
)
from adapters.progress import Bar
from adapters.tables import format_range, format_table
from adapters.texts import check_texts
from adapters.weights.approximation import Approximation
from adapters.weights.kinds import AdapterSpec, match_targets


def resize(
    path: Path,
    out: Path,
    rank: int | None,
    error: float | None,
    bases: Mapping[int, StoredUNet],
) -> str:
    """Write adapters as LoRAs of a lower rank, by singular value decomposition of their updates.

    All stages of an exported folder are resized. The limits are those of
    :meth:`Approximation.limited`, and kinds other than LoRA need their bases, by stage. Returns a
    table of the ranks before and after, and of the errors.
    """
    Approximation.limited(rank, error)
    check_out(out, "new folder")
    path = adapter_path(path)
    adapters = StageAdapter.load_all(path)
    losses = [Approximation.limited(rank, error) for _ in adapters]
    rows = [["", "rank", "parameters", "relative error", "largest", "in"]]
    infos = []
    with new_folder(out) as new:
        for old, loss in zip(adapters, losses, strict=True):
            small = _lower_rank(old, new, loss, bases)
            ranks = f"{format_range(old.ranks.values())} -> {format_range(loss.ranks)}"
            sizes = " -> ".join(tqdm.format_sizeof(each.parameters) for each in (old, small))
            worst, largest = loss.worst
            errors = f"{loss.error:.2g}", f"{largest:.2g}", worst
            rows.append([f"{old.folder}, {old.kind}", ranks, sizes, *errors])
            if small.info is not None:
                infos.append(small.info)
                for file in find_copies(path, small.info.stage):
                    shutil.copyfile(file, new / file.name)
        if infos:
            write_card(new, infos)
    return f"{format_table(rows)}\n{out}"


def _lower_rank(
    adapter: StageAdapter, new: Path, loss: Approximation, bases: Mapping[int, StoredUNet]
) -> StageAdapter:
    check_weights_only(adapter)
    base = choose_base(adapter, bases)
    for module in Bar(adapter.modules, "Decomposing", delay=2, leave=False):
        update = read_update(adapter, module, base)
        assert update is not None
        loss.add_update(module, update)
    info = adapter.info and approximate_info(adapter.info, loss)
    return _write_lora(new / f"stage_{info.stage}" if info else new, loss, info)


def _write_lora(folder: Path, lora: Approximation, info: AdapterInfo | None) -> StageAdapter:
    adapter = StageAdapter(folder, info, lora_config(lora.state), lora.state)
    write_adapter(adapter)
    return adapter


def extract(
    tuned: StoredUNet,
    source: Source,
    out: Path,
    lora: Approximation,
    *,
    targets: str | tuple[str, ...],
    prompts: Sequence[str],
    device: torch.device,
) -> str:
    """Write the LoRA that is nearest to the difference between a tuned UNet and its base.

    Weights are read and decomposed one at a time. Differences outside of the targets, or in
    biases and norms, which are not matrices, cannot be in a LoRA, and count as lost. Targets that
    do not differ are left out. ``lora`` is empty, with its limits set; the new folder gets the
    stage's folder, and a card with the prompts. Returns a sentence about the LoRA and its error.

    Raises:
        UserError: if the UNets have different architectures or do not differ.
    """
    check_out(out, "new folder")
    check_texts(prompts)
    base = StoredUNet.of(source)
    check_architecture(tuned, base)
    modules = frozenset(match_targets(base.unet, targets))
    outside: dict[str, float] = {}
    with new_folder(out) as new:
        for name in Bar(base.weights, "Decomposing", delay=2):
            change = _subtract(tuned.read(name), base.read(name))
            module, _, leaf = name.rpartition(".")
            if change is None:
                continue
            if leaf == "weight" and module in modules:
                lora.add_update(module, change.to(device))
            else:
                lora.add_lost(name, change)
                outside[name] = lora.squares[name][0]
        if not lora.state:
            raise UserError(
                f"{tuned.name} does not differ from {base.name} in any of the {len(modules)}"
                f" modules that the targets {targets!r} match; there is nothing to extract."
            )
        limits = {"tuned": tuned.name, "rank": lora.rank, "error": lora.tolerance}
        info = AdapterInfo(
            base_model=source.name,
            base_revision=source.revision,
            stage=source.stage,
            spec=AdapterSpec(rank=max(lora.ranks), targets=targets),
            prompts=tuple(prompts),
            step=0,
            recipe=yaml.safe_dump({"extract": limits}, sort_keys=False),
            version=__version__,
            approximation_error=lora.error,
        )
        folder = f"stage_{source.stage}"
        _write_lora(new / folder, lora, info := complete_info(info, base.unet))
        write_card(new, [info])
    return f"{out / folder}: a LoRA of {lora.message}.{_format_outside(outside, lora)}"


def _subtract(tuned: Tensor, base: Tensor) -> Tensor | None:
    """Subtract a base's weight from a tuned one in float32; ``None``: they are equal."""
    if tuned.element_size() < base.element_size():
        # rounded as the tuned weight was, before tuning or on saving: rounding is not tuning
        base = base.to(tuned.dtype)
    change = tuned.float() - base.float()
    return change if change.any() else None


def _format_outside(outside: Mapping[str, float], lora: Approximation) -> str:
    """Describe the weights that differ outside of the LoRA's modules, from their squared norms."""
    if not outside:
        return ""
    total = sum(whole for _, whole in lora.squares.values())
    share = (sum(outside.values()) / total) ** 0.5
    names = sorted(outside, key=lambda name: outside[name], reverse=True)
    return (
        f"\n{len(names)} weights outside of its modules differ too, {share:.1%} of the norm of the"
        f" whole difference, and are lost: {listed(names, 8)}."
    )
