"""The difference of two UNets as a LoRA: `python -m adapters.extract TUNED --base BASE ...`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm

from adapters.arguments import available
from adapters.atomic import new_folder
from adapters.base.source import Source, source_of
from adapters.base.stored_unet import StoredUNet
from adapters.errors import UserError, command_line, listed
from adapters.files.export import complete_info, write_adapter
from adapters.files.info import AdapterInfo
from adapters.files.model_card import write_card
from adapters.files.reading import lora_config
from adapters.files.stage_adapter import StageAdapter
from adapters.weights.approximation import Approximation
from adapters.weights.kinds import PRESETS, AdapterSpec, match_targets

DISTRIBUTION = "deepfloyd-if-finetune"


def main(arguments: Sequence[str] | None = None) -> None:
    """Extract a LoRA, and say what it cannot hold."""
    options = parser().parse_args(arguments)
    with command_line():
        source = source_of(options.base, options.revision, options.variant)
        told = extract(
            StoredUNet.find(options.tuned, options.tuned_revision, options.tuned_variant),
            source,
            options.out,
            Approximation.limited(options.rank, options.error),
            targets=options.targets[0] if len(options.targets) == 1 else tuple(options.targets),
            prompts=options.prompt,
            device=available(options.device),
        )
    sys.stdout.write(f"{told}\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="adapters.extract", description=__doc__)
    add = parser.add_argument
    add("tuned", help="the fine-tuned model, folder or hub name, or the folder of its UNet")
    help_ = "the model that it was tuned from, folder or owner/name[@revision]"
    add("--base", required=True, help=help_)
    add("--rank", type=int, help="the largest rank of a module")
    add("--error", type=float, help="the relative error that each module may have, such as 0.1")
    add("--targets", nargs="+", default=["all"], help=f"modules: {', '.join(PRESETS)} or patterns")
    add("--out", type=Path, required=True, help="the new folder")
    add("--prompt", action="append", default=[], help="what shows its effect, for its card")
    add("--device", default="cpu", help="where to decompose, such as cuda (cpu)")
    add("--revision", help="the base's hub revision")
    add("--variant", help="the variant of the base's weights, such as fp16")
    add("--tuned-revision", help="the tuned model's hub revision")
    add("--tuned-variant", help="the variant of its weights")
    return parser


def extract(
    tuned: StoredUNet,
    source: Source,
    out: Path,
    approximation: Approximation,
    *,
    targets: str | tuple[str, ...] = "all",
    prompts: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> str:
    """Write the LoRA that is nearest to what sets a UNet apart from its base.

    Weights are read and decomposed one at a time. What differs outside of the targets, or is no
    matrix (biases, norms), cannot be in a LoRA, and counts as lost.

    Args:
        tuned: the fine-tuned UNet.
        source: its base.
        out: the new folder; it receives the stage's folder and a card.
        approximation: an empty one, with the limits of the LoRA.
        targets: the modules that the LoRA may adapt; those that do not differ are left out.
        prompts: what shows its effect.
        device: where to decompose.

    Returns:
        What was extracted and what was lost, for people.

    Raises:
        UserError: where the UNets are of another architecture or do not differ, a target matches
            nothing, or ``out`` is there or cannot be written.
    """
    base = StoredUNet.of(source)
    architecture = tuned.signature.model_copy(update={"values": {}})
    if difference := architecture.difference(base.signature):
        raise UserError(
            f"{tuned.name} and {base.name} are UNets of another architecture ({difference}); name"
            " the model that it was tuned from."
        )
    modules = frozenset(match_targets(base.unet, targets))
    with new_folder(out) as new:
        for name in tqdm(base.weights, "Decomposing", delay=2):
            change = difference_of(tuned.read(name), base.read(name))
            module, _, leaf = name.rpartition(".")
            if change is None:
                continue
            if leaf == "weight" and module in modules:
                approximation.add_update(module, change.to(device))
            else:
                approximation.add_lost(name, change)
        if not approximation.state:
            raise UserError(
                f"{tuned.name} does not differ from {base.name} in any of the {len(modules)}"
                f" modules that the targets {targets!r} match; there is nothing to extract."
            )
        info = described(approximation, source, base, tuned.name, targets, prompts)
        state, folder = approximation.state, f"stage_{source.stage}"
        write_adapter(StageAdapter(new / folder, info, lora_config(state), state))
        write_card(new, [info])
    return f"{out / folder}: a LoRA of {approximation.message}.{lost(approximation)}"


def difference_of(tuned: Tensor, base: Tensor) -> Tensor | None:
    """What was added to a weight, float32; ``None``: nothing.

    A base of higher precision is rounded first, as it was before tuning or when that was saved, so
    that rounding is not taken for tuning.
    """
    if tuned.element_size() < base.element_size():
        base = base.to(tuned.dtype)
    change = tuned.float() - base.float()
    return change if change.any() else None


def described(
    approximation: Approximation,
    source: Source,
    base: StoredUNet,
    tuned: str,
    targets: str | tuple[str, ...],
    prompts: Sequence[str],
) -> AdapterInfo:
    """What an extracted adapter says of itself."""
    asked = {"rank": approximation.rank, "error": approximation.tolerance}
    info = AdapterInfo(
        base_model=source.name,
        base_revision=source.revision,
        stage=source.stage,
        spec=AdapterSpec(rank=max(approximation.ranks), targets=targets),
        prompts=tuple(prompts),
        step=0,
        recipe=yaml.safe_dump({"extract": {"tuned": tuned} | asked}, sort_keys=False),
        version=version(DISTRIBUTION),
        approximation_error=approximation.error,
    )
    return complete_info(info, base.unet)


def lost(approximation: Approximation) -> str:
    """What an approximation could not hold at all, in a sentence; empty: nothing."""
    adapted = {name.rpartition(".lora_")[0] for name in approximation.state}
    outside = {n: whole for n, (_, whole) in approximation.squares.items() if n not in adapted}
    if not outside:
        return ""
    total = sum(whole for _, whole in approximation.squares.values())
    share = (sum(outside.values()) / total) ** 0.5
    names = sorted(outside, key=lambda name: outside[name], reverse=True)
    return (
        f"\n{len(names)} weights outside of its modules differ too, {share:.1%} of the norm of the"
        f" whole difference, and are lost: {listed(names, 8)}."
    )


if __name__ == "__main__":
    main()
