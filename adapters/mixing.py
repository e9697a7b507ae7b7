"""The adapters of one UNet: each has a scale, and all are merged into its weights in place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from tqdm import tqdm

from adapters.errors import UserError
from adapters.info import BaseSignature
from adapters.layers import Coded, Layer, Plain
from adapters.merging import StageAdapter
from adapters.updates import Term, Terms, Update
from unets.frozen import Quantised


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
    A quantised base needs none (:mod:`adapters.layers`).
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
                updates[module] = adapter.update(module, present[module], base)
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
