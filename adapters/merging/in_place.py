"""Merging adapters into a UNet's weights in place, so that recordings of it stay valid.

The weight of a layer in full precision is overwritten, and a copy of the base's own is kept. A
quantised layer keeps its codes and needs no copy: at every reading, terms are added to the restored
weight from an overlay of tensors at fixed addresses. Their factors are rounded to the layer's
precision, and cost one or two more passes over the weight at each reading, even while the adapters
are switched off.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from adapters.base.signature import BaseSignature
from adapters.errors import UserError
from adapters.files.stage_adapter import StageAdapter
from adapters.progress import Bar
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
"""Ranks of overlays are multiples of this, as matrix units require; the padding is zero."""


@dataclass
class FullPrecisionLayer:
    """A layer in full precision; its weight is overwritten, never replaced."""

    module: nn.Linear | nn.Conv2d
    kept_on: torch.device | None
    """The device of the base's own weight; ``None``: the layer's."""
    own: Tensor = field(init=False)
    """The base's own weight."""
    terms: Terms = ()
    """The terms that are currently merged into the weight."""

    def __post_init__(self) -> None:
        weight = self.module.weight.detach()
        self.own = weight.to(self.kept_on or weight.device, copy=True)
        if weight.is_cuda and not self.own.is_cuda:
            self.own = self.own.pin_memory()  # so that it is copied while the GPU computes

    @property
    def base(self) -> Tensor:
        """The base's own weight, [out, in, ...], on the layer's device."""
        return self.own.to(self.module.weight.device, non_blocking=True)

    def write(self, terms: Terms) -> bool:
        """Merge terms into the base's own weight; without terms, restore it to the bit.

        Returns:
            ``False``: recordings of the layer stay valid, as they read the weight where it is.
        """
        weight = self.module.weight.detach()
        assert weight.is_contiguous() == self.own.is_contiguous(), "the order of columns changed"
        if terms:
            merge(as_matrix(self.base), terms, out=as_matrix(weight))
        else:
            weight.copy_(self.own, non_blocking=True)
        self.terms = terms
        return False

    def release(self) -> bool:
        """Return ``False`` as :meth:`write` does, which has already restored the weight."""
        return False


@dataclass
class QuantisedLayer:
    """A quantised layer; its overlay only grows, until the last adapter of the layer is removed.

    Recordings become invalid then, and whenever the overlay grows: for terms with a larger total
    rank than any before, for the first ones of DoRA, and for the first ones without factors.
    """

    module: Quantised
    terms: Terms = ()
    """The terms that are currently in the overlay."""

    @property
    def base(self) -> Tensor:
        """The restored weight, without the overlay."""
        return self.module.own_weight

    def write(self, terms: Terms) -> bool:
        """Write terms into the overlay, or into a larger one (``True``) if it is too small."""
        before = self.module.overlay
        if before is None and not terms:
            return False
        overlay = self._find_room(before, terms)
        _fill(overlay, terms)
        self.module.overlay, self.terms = overlay, terms
        return overlay is not before

    def release(self) -> bool:
        """Drop the overlay; ``True``: there was one."""
        overlay, self.module.overlay = self.module.overlay, None
        return overlay is not None

    def _find_room(self, overlay: Overlay | None, terms: Terms) -> Overlay:
        """Return the overlay if terms fit into it, or else a larger one without values."""
        low = [update for _, update in terms if isinstance(update, LowRank)]
        rank = sum(update.rank for update in low)
        scaled, dense = any(update.gain is not None for update in low), len(low) < len(terms)
        if overlay is not None:
            present = len(overlay.a), overlay.gain is not None, overlay.dense is not None
            rank, scaled = max(rank, present[0]), scaled or present[1]
            dense = dense or present[2]
            if (rank, scaled, dense) == present:
                return overlay
        rank = -(-rank // RANK_STEP) * RANK_STEP
        codes, dtype = self.module.codes, self.module.dtype
        rows, columns = self.module.shape[0], self.module.shape[1:].numel()
        return Overlay(
            b=codes.new_empty(rows, rank, dtype=dtype),
            a=codes.new_empty(rank, columns, dtype=dtype),
            gain=codes.new_empty(rows, 1, dtype=torch.float32) if scaled else None,
            dense=codes.new_empty(rows, columns, dtype=dtype) if dense else None,
        )


def _fill(overlay: Overlay, terms: Terms) -> None:
    """Write terms into an overlay that is large enough for them."""
    device, start = overlay.b.device, 0
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
    """The adapters of one UNet; each weight is W + Σ scale · (W merged - W), with the base's W.

    The order of the sum depends on the adapters and scales alone, so the same adapters with the
    same scales give the same bits, whatever came before; without any, the weights are W to the bit.

    An adapter's update of each W is computed once, when it is added, and kept in float32: for
    LoRA, rsLoRA and DoRA as factors on the UNet's device, for other kinds as W merged - W in main
    memory. For a base in full precision, a copy of each W that adapters change is kept in its
    precision, on the UNet's device unless ``originals`` says otherwise: with attention as target a
    sixth of Stage I XL (1.4 GB in bf16), with convolutions nine tenths. A quantised base needs no
    copy (:mod:`adapters.merging.in_place`).
    """

    unet: UNet2DConditionModel
    originals: torch.device | None = None
    """The device of copies of the base's weights; ``None``: the UNet's."""
    renew: Callable[[], None] = lambda: None
    """Called when recordings of the UNet become invalid."""
    adapters: dict[str, StageAdapter] = field(default_factory=dict)
    """The adapters by name, in the order in which they were added."""
    scales: dict[str, float] = field(default_factory=dict)
    """The scales by name; 0: the adapter is loaded, but changes nothing."""
    base: BaseSignature = field(init=False)
    """The base's signature, from before any merging."""
    _updates: dict[str, dict[str, Update]] = field(default_factory=dict, init=False)
    """The updates of weights, by adapter and module."""
    _layers: dict[str, FullPrecisionLayer | QuantisedLayer] = field(
        default_factory=dict, init=False
    )
    """The layers that adapters change, by module, whether the adapters are on or off."""

    def __post_init__(self) -> None:
        self.base = BaseSignature.of(self.unet)

    @torch.no_grad()
    def add(self, name: str, adapter: StageAdapter) -> None:
        """Load one more adapter, at the scale 0.

        Raises:
            UserError: if it does not fit the UNet, or the device has no room for what is kept; then
                nothing has changed.
        """
        present = dict(self.unet.named_modules())
        updates = {}
        try:
            for module in Bar(adapter.modules, desc=f"Adapter {name}", leave=False, delay=1):
                if module not in self._layers:
                    self._layers[module] = self._keep(present.get(module), module, adapter)
                updates[module] = adapter.update(module, self._layers[module].base)
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

    def _keep(
        self, module: nn.Module | None, name: str, adapter: StageAdapter
    ) -> FullPrecisionLayer | QuantisedLayer:
        if isinstance(module, Quantised):
            return QuantisedLayer(module)
        if isinstance(module, nn.Linear | nn.Conv2d):
            return FullPrecisionLayer(module, self.originals)
        raise UserError(
            f"{adapter.folder} adapts {name}, which is not a Linear or Conv2d of this UNet; load"
            " the model that it was trained on."
        )

    @torch.no_grad()
    def set(self, scales: Mapping[str, float]) -> None:
        """Set the scale of each adapter; those not named are switched off.

        Only weights that change are written, in place.
        """
        self.scales = {name: scales.get(name, 0.0) for name in self.adapters}
        on = [name for name, scale in self.scales.items() if scale]
        if len(on) > 1:  # in an order that does not depend on when they were added
            on.sort(key=lambda name: (self.adapters[name].digest, self.scales[name]))
        for module, layer in self._layers.items():
            terms = tuple(
                Term(self.scales[name], self._updates[name][module])
                for name in on
                if module in self._updates[name]
            )
            if terms != layer.terms and layer.write(terms):
                self.renew()

    def remove(self, name: str) -> None:
        """Remove an adapter, and free what was kept for it."""
        self.set(self.scales | {name: 0.0})
        for kept in (self.adapters, self.scales, self._updates):
            del kept[name]
        self._release()

    def _release(self) -> None:
        """Release the layers that no adapter changes any more."""
        changed = {module for updates in self._updates.values() for module in updates}
        for module in self._layers.keys() - changed:
            if self._layers.pop(module).release():
                self.renew()
