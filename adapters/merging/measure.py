"""What adapters add to a UNet's weights, measured without forming what need not be formed.

The update of a weight [out, in, ...] is a matrix D [out, in * ...]. A LoRA's is scaling * B A with
B [out, rank] and A [rank, in * ...], whose inner products need matrices of rank x rank only:
<B A, B' A'> = sum((B^T B') * (A A'^T)). Computed in float64.
"""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from peft import LoraConfig
from torch import Tensor

from adapters.base.stored_unet import StoredUNet
from adapters.errors import UserError, listed
from adapters.files.reading import kind_of, scaling
from adapters.files.stage_adapter import StageAdapter
from adapters.weights.updates import LowRank

FLOW = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
"""The parts of a UNet that a picture passes through; embeddings come before them."""


Update: TypeAlias = LowRank | Tensor
"""What is added to a weight: a product, or [out, in, ...]."""


def product_of(adapter: StageAdapter, module: str) -> LowRank | None:
    """The update of a module, float64; ``None``: its adapter is no product, only the base tells."""
    config, tensors = adapter.config, adapter.modules[module]
    if not isinstance(config, LoraConfig) or config.use_dora:
        return None
    a, b = (tensors[f"{module}.lora_{side}.weight"].double() for side in "AB")
    return LowRank(b.flatten(1) * scaling(config, adapter.state, module), a)


def needed_base(adapter: StageAdapter, bases: Mapping[int, StoredUNet]) -> StoredUNet | None:
    """The base without which an adapter's updates are not known; ``None``: it is a plain LoRA.

    Args:
        adapter: of any kind.
        bases: those at hand, by stage.

    Raises:
        UserError: where it is not among them.
    """
    if product_of(adapter, next(iter(adapter.modules))) is not None:
        return None
    configs = {stage: base.unet.config for stage, base in bases.items()}
    stage = adapter.stage_among(configs) if configs else 0
    if stage not in bases:
        raise UserError(
            f"{adapter.folder} is an adapter of kind {kind_of(adapter.config)}, and what that adds"
            " to the weights can only be told with its base; name the base with --base."
        )
    adapter.check_base(bases[stage].signature, bases[stage].name)
    return bases[stage]


def check_weights_only(adapter: StageAdapter) -> None:
    """Raise a UserError where an adapter changes biases too."""
    if biases := [name for name in adapter.state if name.endswith(".bias")]:
        raise UserError(
            f"{adapter.folder} changes biases too (PEFT's lora_bias: {listed(biases, 4)}), which is"
            " not supported; train it without."
        )


def update(adapter: StageAdapter, module: str, base: StoredUNet | None) -> Update | None:
    """What an adapter adds to a module's weight.

    Args:
        adapter: an adapter that fits the base.
        module: one that it adapts.
        base: its base, which kinds other than LoRA need.

    Returns:
        The update; ``None`` where the base is needed and not given.
    """
    product = product_of(adapter, module)
    if product is not None or base is None:
        return product
    with torch.no_grad():
        return adapter.delta(module, base.read(f"{module}.weight"))


def inner(one: Update, other: Update) -> float:
    """The Frobenius inner product of two updates of one weight."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return float(one.inner(other))
    x, y = (u.product() if isinstance(u, LowRank) else u.double() for u in (one, other))
    return float((x.flatten() * y.flatten()).sum())


def shape_of(update: Update) -> list[int]:
    """The shape of the weight that an update is added to."""
    return list(update.shape)


def block_of(name: str) -> str:
    """The UNet's block that a module or parameter is in: ``down_blocks.0``, ``mid_block`` ..."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first in ("down_blocks", "up_blocks") else first


def by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by block, in the order a picture passes through a UNet."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(block_of(name), []).append(name)
    return dict(sorted(blocks.items(), key=lambda item: _depth(item[0])))


def _depth(block: str) -> tuple[int, int]:
    part, _, number = block.partition(".")
    return FLOW.index(part) if part in FLOW else -1, int(number or 0)
