"""Dropout without a random state: a mask is a function of a key, the layer and the element.

A picture's mask then depends on its key alone, not on the pictures beside it, the process or what
was drawn before; gradient checkpointing repeats it, and a CUDA graph replays it with other keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.loha import LoHaLayer
from peft.tuners.lora.dora import DoraConv2dLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor, nn

from unets.frozen import Quantised

GOLDEN_RATIO = 0x9E3779B9
"""2**32 over the golden ratio: its multiples spread the layers' numbers over all 32 bits."""


def _signed(value: int) -> int:
    """The int32 with the lowest 32 bits of an integer."""
    return (value + 2**31) % 2**32 - 2**31


def hash_bits(keys: Tensor, layer: int, count: int) -> Tensor:
    """An integer hash of (key, layer, element), uniform over all of int32.

    The multiplications and shifts are those of "lowbias32" (C. Wellons, "Prospecting for hash
    functions", 2018); half of the key enters before them, half between.

    Args:
        keys: [N] int64, themselves evenly distributed.
        layer: tells the layers of a model apart.
        count: how many elements.

    Returns:
        [N, count] int32.
    """
    salt = _signed(layer * GOLDEN_RATIO)
    low, high = (half.int()[:, None] + salt for half in (keys, keys >> 32))
    bits = torch.arange(count, dtype=torch.int32, device=keys.device) + low
    bits ^= (bits >> 16) & 0xFFFF  # shifts keep the sign, which a hash must not
    bits *= 0x7FEB352D
    bits += high
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _signed(0x846CA68B)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


@dataclass
class DropoutKeys:
    """What the masks of all layers of a model derive from; to be set before its forward pass."""

    values: Tensor | None = None
    """[B, 2] int64: each picture's key, and beside each that of the optimizer step."""

    def keep_inputs(self, share: float, layer: int, inputs: Tensor) -> Tensor:
        """A mask of activations [B, ...] that drops a share of them; each picture has its own."""
        assert self.values is not None, "dropout needs the batch's keys"
        bits = hash_bits(self.values[:, 0], layer, inputs[0].numel())
        return (bits >= _threshold(share)).view(inputs.shape)

    def keep_rows(self, share: float, layer: int, rows: int) -> Tensor:
        """A mask [rows] that drops a share of a weight's rows, one for the whole step."""
        assert self.values is not None, "dropout needs the batch's keys"
        return (hash_bits(self.values[:1, 1], layer, rows) >= _threshold(share)).view(-1)


def _threshold(share: float) -> int:
    return min(round(share * 2**32), 2**32 - 1) - 2**31


class KeyedDropout(nn.Module):
    """Dropout of activations [B, ...] in training: ``nn.Dropout``, its masks keyed by picture."""

    def __init__(self, share: float, layer: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.share, self.layer, self.keys = share, layer, keys

    def forward(self, inputs: Tensor) -> Tensor:
        """Drop a share of the elements, and scale the others up by as much."""
        if not self.training:
            return inputs
        kept = self.keys.keep_inputs(self.share, self.layer, inputs)
        return torch.where(kept, inputs / (1 - self.share), 0)


def key_dropout(model: nn.Module, weight_share: float) -> DropoutKeys:
    """Replace all that draws in a model in training by what derives from keys, in place.

    That is every ``nn.Dropout``, LoRA's and the model's own; and what PEFT drops of weights: rows
    of the updates of LoHa and LoKr, and blocks of OFT's rotations (which PEFT 0.21 has a setting
    for but does not drop).

    Args:
        model: with its adapter attached.
        weight_share: the share of rows or blocks that is dropped.

    Returns:
        The keys to set before each forward pass in training.
    """
    keys = DropoutKeys()
    for layer, (parent, name, child) in enumerate(list(_dropouts(model))):
        setattr(parent, name, KeyedDropout(child.p, layer, keys).train(child.training))
    for layer, module in enumerate(model.modules()):
        if isinstance(module, LycorisLayer):
            _drop_rows(module, weight_share, layer, keys)
        if isinstance(module, OFTRotationModule) and weight_share > 0:
            _drop_blocks(module, weight_share, layer, keys)
        if type(module) is DoraConv2dLayer:
            module.__class__ = _DroppingDora
    return keys


class _DroppingDora(DoraConv2dLayer):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's DoRA of a convolution, on a base of any precision where its input is dropped out.

    PEFT convolves the dropped input, in float32, with the base's weight as it is.
    """

    def forward(
        self,
        x: Tensor,
        *,
        base_layer: nn.Conv2d,
        base_result: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """What DoRA adds to the layer's result."""
        if base_result is None:
            # reading a quantised layer's weight would restore it
            source = base_layer if isinstance(base_layer, Quantised) else base_layer.weight
            base_result = base_layer(x.to(source.dtype))
        result: Tensor = super().forward(
            x, base_layer=base_layer, base_result=base_result, **options
        )
        return result


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Dropout]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout) and child.p > 0:
                yield parent, name, child


def _drop_rows(module: LycorisLayer, share: float, layer: int, keys: DropoutKeys) -> None:
    """Have a LoHa or LoKr drop rows of its update by key: LoHa scales the others up, as in PEFT."""
    # PEFT leaves a module out where a draw from [0, 1) is not above this, which at 0 still happens
    module.module_dropout = dict.fromkeys(module.module_dropout, -1.0)
    whole_update = module.get_delta_weight

    def get_delta_weight(adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        weight: Tensor = whole_update(adapter_name)
        if not apply_rank_dropout:
            return weight
        kept = keys.keep_rows(share, layer, len(weight)).to(weight.dtype)
        if isinstance(module, LoHaLayer):
            kept = kept / kept.mean().clamp(min=1 / len(kept))  # where none is kept, nothing is
        return weight * kept.view(-1, *[1] * (weight.dim() - 1))

    module.get_delta_weight = get_delta_weight


def _drop_blocks(rotation: OFTRotationModule, share: float, layer: int, keys: DropoutKeys) -> None:
    """Have an OFT drop blocks of its rotation by key: one of generator zero does not rotate."""
    whole_rotation = rotation._cayley_batch

    def cayley_batch(generators: Tensor, *options: int) -> Tensor:
        if rotation.training:
            generators = generators * keys.keep_rows(share, layer, len(generators))[:, None]
        return whole_rotation(generators, *options)

    rotation._cayley_batch = cayley_batch
