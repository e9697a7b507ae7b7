"""Dropout without a random state: a mask is a function of a key, the layer and the element.

A picture's mask thus depends only on its key, not on the rest of its batch, the process or earlier
draws; gradient checkpointing repeats the mask, and a CUDA graph can replay with other keys.
"""

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
    """Return the int32 with the lowest 32 bits of an integer."""
    return (value + 2**31) % 2**32 - 2**31


def hash_bits(keys: Tensor, layer: int, count: int) -> Tensor:
    """Hash (key, layer, element) to an integer, uniformly over all of int32.

    The multiplications and shifts are those of "lowbias32" (C. Wellons, "Prospecting for hash
    functions", 2018); half of the key is added before them, half in between. Keys are [N] int64,
    evenly distributed, and hashes [N, count] int32.
    """
    salt = _signed(layer * GOLDEN_RATIO)
    low, high = (half.int()[:, None] + salt for half in (keys, keys >> 32))
    bits = torch.arange(count, dtype=torch.int32, device=keys.device) + low
    bits ^= (bits >> 16) & 0xFFFF  # >> repeats an int32's sign bit, so mask it off
    bits *= 0x7FEB352D
    bits += high
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _signed(0x846CA68B)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


@dataclass
class DropoutKeys:
    """The keys of all masks of a model; set them before its forward pass."""

    values: Tensor | None = None
    """Each picture's key and the optimizer step's key, [B, 2] int64."""

    def keep_inputs(self, share: float, layer: int, inputs: Tensor) -> Tensor:
        """Make a mask for activations [B, ...] that drops a share of them, keyed by picture."""
        assert self.values is not None, "dropout needs the batch's keys"
        return _keep(share, self.values[:, 0], layer, inputs[0].numel()).view(inputs.shape)

    def keep_rows(self, share: float, layer: int, rows: int) -> Tensor:
        """Make a mask [rows] that drops a share of a weight's rows, the same all step long."""
        assert self.values is not None, "dropout needs the batch's keys"
        return _keep(share, self.values[:1, 1], layer, rows).view(-1)


def _keep(share: float, keys: Tensor, layer: int, count: int) -> Tensor:
    """Make a mask [N, count] that is false for a share of the elements, the lowest hashes."""
    threshold = min(round(share * 2**32), 2**32 - 1) - 2**31
    return hash_bits(keys, layer, count) >= threshold


class KeyedDropout(nn.Module):
    """Dropout of activations [B, ...] in training, as ``nn.Dropout`` but keyed by picture."""

    def __init__(self, share: float, layer: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.share, self.layer, self.keys = share, layer, keys

    def forward(self, inputs: Tensor) -> Tensor:
        """Drop a share of the elements, and scale the others up."""
        if not self.training:
            return inputs
        kept = self.keys.keep_inputs(self.share, self.layer, inputs)
        return torch.where(kept, inputs / (1 - self.share), 0)


def key_dropout(model: nn.Module, weight_share: float) -> DropoutKeys:
    """Replace a model's dropout by dropout that derives from keys, in place.

    This covers every ``nn.Dropout``, whether LoRA's or the model's own, and PEFT's dropout of
    weights: rows of LoHa's and LoKr's updates, and blocks of OFT's rotations (PEFT 0.21 has a
    setting for blocks but drops none), of which it drops ``weight_share``. Returns the keys to set
    before each forward pass in training.
    """
    keys = DropoutKeys()
    dropouts = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Dropout) and child.p > 0
    ]
    for layer, (parent, name, child) in enumerate(dropouts):
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
    """PEFT's DoRA of a convolution, with dropout that works on a base of any precision.

    PEFT itself would convolve the float32 input left by dropout with a base weight of another
    dtype.
    """

    def forward(
        self,
        x: Tensor,
        *,
        base_layer: nn.Conv2d,
        base_result: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Compute the part that DoRA adds to the layer's result."""
        if base_result is None:
            # a quantised layer has a dtype of its own, as reading its weight would restore it
            source = base_layer if isinstance(base_layer, Quantised) else base_layer.weight
            base_result = base_layer(x.to(source.dtype))
        return super().forward(x, base_layer=base_layer, base_result=base_result, **options)


def _drop_rows(module: LycorisLayer, share: float, layer: int, keys: DropoutKeys) -> None:
    """Make LoHa or LoKr drop rows of its update by key; LoHa scales the others up, as in PEFT."""
    # below 0, as PEFT skips a module if a draw from [0, 1) is not above this, possible even at 0
    module.module_dropout = dict.fromkeys(module.module_dropout, -1.0)
    whole_update = module.get_delta_weight

    def get_delta_weight(adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        weight: Tensor = whole_update(adapter_name)
        if not apply_rank_dropout:
            return weight
        kept = keys.keep_rows(share, layer, len(weight)).to(weight.dtype)
        if isinstance(module, LoHaLayer):
            kept = kept / kept.mean().clamp(min=1 / len(kept))  # no 0 / 0 where no row is kept
        return weight * kept.view(-1, *[1] * (weight.dim() - 1))

    module.get_delta_weight = get_delta_weight


def _drop_blocks(rotation: OFTRotationModule, share: float, layer: int, keys: DropoutKeys) -> None:
    """Make OFT drop blocks of its rotation by key: a block with generator 0 does not rotate."""
    whole_rotation = rotation._cayley_batch

    def cayley_batch(generators: Tensor, *options: int) -> Tensor:
        if rotation.training:
            generators = generators * keys.keep_rows(share, layer, len(generators))[:, None]
        return whole_rotation(generators, *options)

    rotation._cayley_batch = cayley_batch
