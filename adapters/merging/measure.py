"""The size of an adapter's updates, by module and block of the UNet.

The update of a weight [out, in, ...] is a matrix D [out, in * ...]. For a LoRA it is B A, which is
measured without being formed. Norms are computed in float64.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from peft import LoraConfig
from torch import Tensor

from adapters.base.source import sources_of
from adapters.base.stored_unet import StoredUNet
from adapters.errors import UserError, listed
from adapters.files.reading import scaling
from adapters.files.stage_adapter import StageAdapter
from adapters.weights.updates import LowRank

FLOW = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
"""The parts of a UNet that a picture passes through; embeddings come before them."""


def find_bases(
    names: Sequence[str], revision: str | None = None, variant: str | None = None
) -> dict[int, StoredUNet]:
    """Find the UNets of bases, by stage."""
    sources = sources_of(names, revision, variant)
    return {stage: StoredUNet.of(source) for stage, source in sources.items()}


def choose_base(adapter: StageAdapter, bases: Mapping[int, StoredUNet]) -> StoredUNet | None:
    """Choose the base that an adapter's updates depend on; ``None``: a LoRA's need none.

    Raises:
        UserError: if it is not among ``bases``, which are by stage.
    """
    if _is_product(adapter):
        return None
    configs = {stage: base.unet.config for stage, base in bases.items()}
    stage = adapter.stage_among(configs) if configs else 0
    if stage not in bases:
        raise UserError(
            f"{adapter.folder} is an adapter of kind {adapter.kind}, whose updates depend on its"
            " base; name the base with --base."
        )
    adapter.check_base(bases[stage].signature, bases[stage].name)
    return bases[stage]


def check_weights_only(adapter: StageAdapter) -> None:
    """Raise a UserError if an adapter changes biases too."""
    if biases := [name for name in adapter.state if name.endswith(".bias")]:
        raise UserError(
            f"{adapter.folder} changes biases too (PEFT's lora_bias: {listed(biases, 4)}), which is"
            " not supported; train it without lora_bias."
        )


def check_architecture(one: StoredUNet, other: StoredUNet) -> None:
    """Raise a UserError if two UNets differ in more than their weights."""
    if difference := one.signature.model_copy(update={"values": {}}).difference(other.signature):
        raise UserError(
            f"{one.name} and {other.name} are UNets of different architectures ({difference}); name"
            " two of the same architecture."
        )


def read_update(
    adapter: StageAdapter, module: str, base: StoredUNet | None
) -> LowRank | Tensor | None:
    """Read what an adapter adds to a module's weight; kinds other than LoRA need their base.

    Returns:
        B A in float64, or a tensor [out, in, ...]; ``None`` if the base is needed and not given.
    """
    if _is_product(adapter):
        tensors, factor = adapter.modules[module], scaling(adapter.config, module)
        a, b = (tensors[f"lora_{side}.weight"].double() for side in "AB")
        return LowRank(b.flatten(1) * factor, a)
    if base is None:
        return None
    with torch.no_grad():
        return adapter.delta(module, base.read(f"{module}.weight"))


def _is_product(adapter: StageAdapter) -> bool:
    return isinstance(adapter.config, LoraConfig) and not adapter.config.use_dora


def inner(one: LowRank | Tensor, other: LowRank | Tensor) -> float:
    """Compute the Frobenius inner product of two updates of one weight."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return float(one.inner(other))
    x, y = (u.product() if isinstance(u, LowRank) else u.double() for u in (one, other))
    return float((x.flatten() * y.flatten()).sum())


def sum_by_group(
    groups: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[float]]
) -> Iterator[tuple[str, int, list[float]]]:
    """Sum modules' values by group, column by column, and finally over all modules.

    Yields the name of each group, its number of modules, and its sums.
    """
    for group, names in (dict(groups) | {"all": list(values)}).items():
        columns = zip(*(values[name] for name in names), strict=True)
        yield group, len(names), [sum(column) for column in columns]


def group_by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Group modules or parameters by block, in the order that a picture passes through a UNet."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        part, number, *_ = [*name.split("."), ""]
        block = f"{part}.{number}" if part in ("down_blocks", "up_blocks") else part
        blocks.setdefault(block, []).append(name)
    return dict(sorted(blocks.items(), key=lambda item: _depth(item[0])))


def _depth(block: str) -> tuple[int, int]:
    part, _, number = block.partition(".")
    return FLOW.index(part) if part in FLOW else -1, int(number or 0)
