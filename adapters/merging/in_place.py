"""Layers whose weights take adapters in place, so that what was recorded of them stays valid.

A layer in full precision is written over: with what terms make of the base's own weight, of which
a copy is kept. A quantised layer keeps its codes and needs no copy: terms are laid over the weight
that it restores at every reading, from tensors at addresses that stay. Their factors are rounded to
the layer's precision, and cost one or two more passes over the weight at each reading, even while
they are switched off.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from adapters.base.signature import BaseSignature
from adapters.errors import UserError
from adapters.files.stage_adapter import StageAdapter
from adapters.weights.updates import (
    Dense,
    LowRank,
    Term,
    Terms,
    Update,
    as_matrix,
    change,
    gain,
    merge,
)
from unets.frozen import Overlay, Quantised

RANK_STEP = 8
"""Ranks of overlays are multiples of this, as matrix units ask for; what terms leave is zero."""


class Layer(Protocol):
    """A layer of a UNet that adapters change."""

    @property
    def base(self) -> Tensor:
        """The base's own weight, [out, in, ...], on the layer's device."""

    def write(self, terms: Sequence[Term]) -> bool:
        """Have the weight be what terms make of the base's own; of none, that itself, to the bit.

        Returns:
            Whether recordings that read the weight have to be made anew.
        """

    def release(self) -> bool:
        """Leave the layer as it was before any adapter; returned is as in ``write``."""


@dataclass
class Plain:
    """A layer in full precision; its weight is written over, never replaced."""

    module: nn.Linear | nn.Conv2d
    kept_on: torch.device | None
    """Where the base's own weight is kept; ``None``: beside the layer's."""
    own: Tensor = field(init=False)

    def __post_init__(self) -> None:
        weight = self.module.weight.detach()
        self.own = weight.to(self.kept_on or weight.device, copy=True)
        if weight.is_cuda and not self.own.is_cuda:
            self.own = self.own.pin_memory()

    @property
    def base(self) -> Tensor:
        """The copy, brought to the layer's device where it is kept elsewhere."""
        return self.own.to(self.module.weight.device, non_blocking=True)

    def write(self, terms: Sequence[Term]) -> bool:
        """Write over the weight; recordings read it where it is."""
        weight = self.module.weight.detach()
        assert weight.is_contiguous() == self.own.is_contiguous(), "the order of columns changed"
        if terms:
            merge(as_matrix(self.base), terms, out=as_matrix(weight))
        else:
            weight.copy_(self.own, non_blocking=True)
        return False

    def release(self) -> bool:
        """Nothing is left to do."""
        return False


@dataclass
class Coded:
    """A quantised layer; its overlay only grows, until the last adapter of the layer is removed.

    Recordings have to be made anew then, and where the overlay grows: for terms that have together
    a larger rank than any before, are the first ones of DoRA, or the first ones without factors.
    """

    module: Quantised

    @property
    def base(self) -> Tensor:
        """The restored weight, without the overlay."""
        return self.module.own_weight

    def write(self, terms: Sequence[Term]) -> bool:
        """Write over the overlay, on a larger one where it is too small."""
        before = self.module.overlay
        if before is None and not terms:
            return False
        overlay = self._large_enough(before, terms)
        _fill(overlay, terms)
        self.module.overlay = overlay
        return overlay is not before

    def release(self) -> bool:
        """Drop the overlay."""
        overlay, self.module.overlay = self.module.overlay, None
        return overlay is not None

    def _large_enough(self, overlay: Overlay | None, terms: Sequence[Term]) -> Overlay:
        low = [update for _, update in terms if isinstance(update, LowRank)]
        rank = sum(update.rank for update in low)
        scaled = any(update.gain is not None for update in low)
        dense = len(low) < len(terms)
        if overlay is not None:
            scaled |= overlay.gain is not None
            dense |= overlay.dense is not None
            present = (overlay.gain is not None, overlay.dense is not None)
            if rank <= len(overlay.a) and present == (scaled, dense):
                return overlay
            rank = max(rank, len(overlay.a))
        rank = -(-rank // RANK_STEP) * RANK_STEP
        layer, codes = self.module, self.module.codes
        rows, columns = layer.shape[0], layer.shape[1:].numel()
        return Overlay(
            b=codes.new_empty(rows, rank, dtype=layer.dtype),
            a=codes.new_empty(rank, columns, dtype=layer.dtype),
            gain=codes.new_empty(rows, 1, dtype=torch.float32) if scaled else None,
            dense=codes.new_empty(rows, columns, dtype=layer.dtype) if dense else None,
        )


def _fill(overlay: Overlay, terms: Sequence[Term]) -> None:
    """Write terms into an overlay that is large enough for them."""
    device = overlay.b.device
    start = 0
    for factor, update in terms:
        if isinstance(update, LowRank):
            part = slice(start, start + update.rank)
            torch.mul(update.b.to(device), factor * update.scaling, out=overlay.b[:, part])
            overlay.a[part] = update.a
            start = part.stop
    overlay.b[:, start:].zero_()
    overlay.a[start:].zero_()
    if overlay.gain is not None:
        scale = gain(terms, device)
        overlay.gain.copy_(torch.ones(()) if scale is None else scale)
    if overlay.dense is not None:
        added = change([term for term in terms if isinstance(term.update, Dense)], device)
        overlay.dense.copy_(torch.zeros(()) if added is None else added)


@dataclass
class MergedAdapters:
    """The adapters of one UNet; each weight is W + Σ scale · (W merged - W), W the base's own.

    The sum is in an order that adapters have by themselves, so the same adapters with the same
    scales give the same bits, whatever came before; with no adapter the weights are W to the bit.

    What an adapter makes of each W is computed once, when it is added: the factors of LoRA, rsLoRA
    and DoRA, which stay in float32 on the UNet's device; of other kinds W merged - W, which stays
    in float32 in main memory. Of a base in full precision a copy of each W that adapters change
    stays in its precision, on the UNet's device unless ``originals`` says otherwise: with
    attention as target a sixth of Stage I XL (1.4 GB in bf16), with convolutions nine tenths.
    A quantised base needs none (:mod:`adapters.merging.in_place`).
    """

    unet: UNet2DConditionModel
    originals: torch.device | None = None
    """Where copies of the base's weights are kept; ``None``: on the UNet's device."""
    renew: Callable[[], None] = lambda: None
    """Called where recordings of the UNet are no longer valid."""
    adapters: dict[str, StageAdapter] = field(default_factory=dict)
    """By name, in the order in which they came."""
    scales: dict[str, float] = field(default_factory=dict)
    """By name; 0: the adapter is loaded, and changes nothing."""
    base: BaseSignature = field(init=False)
    """The base's signature, from before any merging."""
    _updates: dict[str, dict[str, Update]] = field(default_factory=dict, init=False)
    """What adapters make of weights, by adapter and module."""
    _layers: dict[str, Layer] = field(default_factory=dict, init=False)
    """The modules that adapters change, whether they are on or off."""
    _written: dict[str, Terms] = field(default_factory=dict, init=False)
    """What is merged into them at present."""

    def __post_init__(self) -> None:
        self.base = BaseSignature.of(self.unet)

    @torch.no_grad()
    def add(self, name: str, adapter: StageAdapter) -> None:
        """Load one more adapter, at the scale 0.

        Raises:
            UserError: where it does not fit the UNet, or the device has no room for what is kept;
                nothing has changed then.
        """
        present = dict(self.unet.named_modules())
        updates = {}
        try:
            for module in tqdm(adapter.modules, desc=f"Adapter {name}", leave=False, delay=1):
                if module not in self._layers:
                    self._layers[module] = self._layer(present.get(module), module, adapter)
                    self._written[module] = ()
                base = self._layers[module].base
                updates[module] = adapter.update(module, base)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.unet.device} has no room for {adapter.folder} and a copy of the weights"
                " that it changes; load the cascade with originals='cpu', which keeps the copy in"
                " main memory, or with a quantised base, which needs none."
            ) from error
        finally:
            if len(updates) < len(adapter.modules):
                self._release()
        self.adapters[name], self.scales[name], self._updates[name] = adapter, 0.0, updates

    def _layer(self, module: nn.Module | None, name: str, adapter: StageAdapter) -> Layer:
        if isinstance(module, Quantised):
            return Coded(module)
        if isinstance(module, nn.Linear | nn.Conv2d):
            return Plain(module, self.originals)
        raise UserError(
            f"{adapter.folder} adapts {name}, which is no Linear or Conv2d of this UNet; load the"
            " model that it was trained on."
        )

    @torch.no_grad()
    def set(self, scales: Mapping[str, float]) -> None:
        """Set the scale of each adapter; those not named are switched off.

        Only weights that change are written, in place.
        """
        self.scales = {name: scales.get(name, 0.0) for name in self.adapters}
        on = [name for name, scale in self.scales.items() if scale]
        if len(on) > 1:
            on.sort(key=lambda name: (self.adapters[name].digest, self.scales[name]))
        for module, layer in self._layers.items():
            terms = tuple(
                Term(self.scales[name], self._updates[name][module])
                for name in on
                if module in self._updates[name]
            )
            if terms != self._written[module]:
                if layer.write(terms):
                    self.renew()
                self._written[module] = terms

    def remove(self, name: str) -> None:
        """Take an adapter out, and give back what was kept for it."""
        self.set(self.scales | {name: 0.0})
        for kept in (self.adapters, self.scales, self._updates):
            del kept[name]
        self._release()

    def _release(self) -> None:
        """Let go of the layers that no adapter changes any more."""
        changed = {module for updates in self._updates.values() for module in updates}
        for module in self._layers.keys() - changed:
            del self._written[module]
            if self._layers.pop(module).release():
                self.renew()
