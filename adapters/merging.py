"""Merging adapters of any kind into a UNet's weights, and taking them out again."""

import logging
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import (
    PeftConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from adapters.errors import UserError
from adapters.formats import listed, module_of, read_adapter
from adapters.info import HEADER_KEY, AdapterInfo, BaseSignature, parse_info, stage_folders
from adapters.kinds import ADAPTER_NAME
from unets.frozen import Quantised, restored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageAdapter:
    """The adapter of one stage, loaded: an exported one, or one that another tool wrote."""

    folder: Path
    """Its folder or file."""
    info: AdapterInfo | None
    """What it says of itself; ``None``: another tool wrote it."""
    config: PeftConfig
    state: dict[str, Tensor]
    """Its tensors under PEFT's names without prefix, on the CPU."""

    @classmethod
    def load(cls, folder: Path) -> "StageAdapter":
        """Load a stage's folder, or a file of any style that :mod:`adapters.formats` knows.

        Raises:
            UserError: where it holds no adapter, or one with keys that are unknown or unpaired.
        """
        config, state, header = read_adapter(folder)
        info = parse_info(header, folder) if HEADER_KEY in header else None
        return cls(folder, info, config, state)

    @classmethod
    def load_all(cls, path: Path) -> list["StageAdapter"]:
        """Load the adapters of all stages in an exported folder, or a single one.

        Raises:
            UserError: as :meth:`load`.
        """
        return [cls.load(place) for place in stage_folders(path)]

    @cached_property
    def modules(self) -> dict[str, dict[str, Tensor]]:
        """The adapter's tensors by the module they adapt."""
        split: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.state.items():
            split.setdefault(module_of(name), {})[name] = tensor
        return split

    def stage_among(self, configs: Mapping[int, Mapping[str, Any]]) -> int:
        """The stage it belongs to: the one it names, or else the only one whose UNet it fits.

        Args:
            configs: the configurations of UNets, by stage.

        Raises:
            UserError: where it names none and fits none of these, listing what does not fit, or
                fits both.
        """
        if self.info is not None:
            return self.info.stage
        misfits = {stage: self.misfits(config) for stage, config in configs.items()}
        fitting = [stage for stage, names in misfits.items() if not names]
        if len(fitting) > 1:
            raise UserError(
                f"{self.folder} does not say which stage it belongs to, and fits those of Stage"
                f" {' and '.join(map(str, fitting))}; load it where only its own stage is loaded."
            )
        if not fitting:
            nearest = min(misfits, key=lambda stage: len(misfits[stage]))
            raise UserError(
                f"{self.folder} fits no UNet here by the names and shapes of its"
                f" {len(self.state)} tensors; of Stage {nearest}, the nearest, these are unknown,"
                f" missing or of another shape: {listed(misfits[nearest])}; load the model that it"
                " was trained on."
            )
        return fitting[0]

    def misfits(self, config: Mapping[str, Any]) -> list[str]:
        """The tensors that PEFT would not load into a UNet of a configuration, or would miss."""
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
            present = dict(unet.named_modules())
            unknown = [name for name in self.modules if name not in present]
            if len(unknown) < len(self.modules):
                inject_adapter_in_model(self.config, unet, ADAPTER_NAME)
                needed = get_peft_model_state_dict(unet, adapter_name=ADAPTER_NAME)
            else:
                needed = {}
        names = dict.fromkeys([*self.state, *needed])
        both = self.state.keys() & needed.keys()
        return [n for n in names if n not in both or self.state[n].shape != needed[n].shape]

    def check_base(self, base: BaseSignature, name: str) -> None:
        """Check that it was trained on a base; where it does not say on which, say so.

        Args:
            base: the signature of the base's UNet.
            name: the base's name, for messages.

        Raises:
            UserError: where it was trained on another.
        """
        if self.info is None or self.info.base_signature is None:
            logger.warning(
                "%s does not say on which base it was trained; it fits %s by names and shapes.",
                self.folder,
                name,
            )
            return
        difference = self.info.base_signature.difference(base)
        if difference is not None:
            raise UserError(
                f"The adapter {self.folder} was trained on Stage {self.info.stage} of"
                f" {self.info.base_model!r}, not of {name!r} ({difference}); load the base that it"
                " was trained on."
            )

    def delta(self, name: str, module: nn.Module, weight: Tensor) -> Tensor:
        """What merging adds to a module's weight: PEFT's own merge, in float32.

        Args:
            name: the module's full name.
            module: the module, for its shape and settings.
            weight: its weight in the base.
        """
        own = nn.Parameter(weight.to(torch.float32, copy=True))  # PEFT merges in place
        copied = deepcopy(module, {id(module.weight): own})
        root = _alone(name, copied)
        config = copy(self.config)
        config.target_modules = {name}  # PEFT would shorten many names to ambiguous endings
        for field_name in vars(config).keys() & {"rank_pattern", "alpha_pattern"}:  # OFT has none
            patterns = vars(config)[field_name]
            vars(config)[field_name] = {
                p: v for p, v in patterns.items() if get_pattern_key([p], name) == p
            }
        with torch.random.fork_rng(devices=[]):  # PEFT draws initial values, which are overwritten
            inject_adapter_in_model(config, root, ADAPTER_NAME)
        result = set_peft_model_state_dict(root, self.modules[name], ADAPTER_NAME)
        assert not result.unexpected_keys
        layer = root.get_submodule(name)
        assert isinstance(layer, BaseTunerLayer)
        layer.merge()
        return layer.get_base_layer().weight.detach().sub_(weight)


def merged_weight(
    adapters: Sequence[tuple[StageAdapter, float]], name: str, module: nn.Module, weight: Tensor
) -> Tensor:
    """A module's weight with adapters merged, in float32.

    Args:
        adapters: adapters of its stage, and how much of each.
        name: the module's full name.
        module: the module, for its shape and settings.
        weight: its weight in the base, which stays as it is.
    """
    merged = weight
    for adapter, scale in adapters:
        if name in adapter.modules:  # summed in the memory of the update
            merged = adapter.delta(name, module, weight).mul_(scale).add_(merged)
    return merged.float()


def _alone(name: str, module: nn.Module) -> nn.Module:
    """A model in which a module stands alone under its full name, as PEFT matches by name."""
    for part in reversed(name.split(".")):
        parent = nn.Module()
        parent.add_module(part, module)
        module = parent
    return module


@dataclass
class MergedAdapters:
    """The adapters merged into one UNet; their updates add up.

    Every update is computed from the base's own weights, so the order of adapters does not matter,
    and the base's weights are kept on the CPU, so that removing adapters restores them to the bit.
    Of a quantised base the layers that adapters change are in the UNet's precision while merged, as
    quantising them again would drown a small update in its rounding.
    """

    unet: UNet2DConditionModel
    adapters: list[tuple[StageAdapter, float]] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)
    """The base's weights of all modules that adapters have changed, by module."""
    quantised: dict[str, nn.Module] = field(default_factory=dict)
    """The layers of a quantised base that layers in full precision stand in for, by name."""
    base: BaseSignature = field(init=False)
    """The base's signature, from before any merging."""

    def __post_init__(self) -> None:
        self.base = BaseSignature.of(self.unet)

    @torch.no_grad()
    def add(self, adapter: StageAdapter, scale: float) -> None:
        """Merge one more adapter: each weight W becomes W + scale * (W merged - W)."""
        self.adapters.append((adapter, scale))
        for name in adapter.modules:
            module = self.unet.get_submodule(name)
            if isinstance(module, Quantised):
                self.quantised[name], module = module, restored(module)
                self.unet.set_submodule(name, module)
            if name not in self.originals:
                self.originals[name] = module.weight.detach().to("cpu", copy=True)
            weight = self.originals[name].to(module.weight.device)
            module.weight.copy_(merged_weight(self.adapters, name, module, weight))

    @torch.no_grad()
    def remove(self) -> None:
        """Take all adapters out."""
        for name, layer in self.quantised.items():
            self.unet.set_submodule(name, layer)
            del self.originals[name]
        for name, original in self.originals.items():
            self.unet.get_submodule(name).weight.copy_(original)
        self.adapters.clear()
        self.originals.clear()
        self.quantised.clear()
