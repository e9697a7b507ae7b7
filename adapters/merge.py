"""Merging adapters of any kind into a UNet's weights, and taking them out again."""

import json
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters.errors import UserError
from adapters.info import PEFT_WEIGHTS, AdapterInfo, BaseSignature, read_info
from adapters.kinds import ADAPTER_NAME
from unets.frozen import Quantised, restored

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class StageAdapter:
    """The exported adapter of one stage, loaded."""

    folder: Path
    info: AdapterInfo
    config: PeftConfig
    state: dict[str, Tensor]
    """Its tensors under PEFT's names without prefix, on the CPU."""

    @classmethod
    def load(cls, folder: Path) -> "StageAdapter":
        """Load a stage's folder.

        Raises:
            UserError: where the folder holds no adapter of this toolkit.
        """
        info = read_info(folder)
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise UserError(
                f"{folder / 'adapter_config.json'} cannot be read ({error}); export again."
            ) from error
        tensors = load_file(folder / PEFT_WEIGHTS)
        state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        return cls(folder, info, config, state)

    @cached_property
    def modules(self) -> dict[str, dict[str, Tensor]]:
        """The adapter's tensors by the module they adapt."""
        prefixes = {f"{module}.": module for module in self.config.target_modules}
        split: dict[str, dict[str, Tensor]] = {module: {} for module in self.config.target_modules}
        for name, tensor in self.state.items():
            module = next(m for prefix, m in prefixes.items() if name.startswith(prefix))
            split[module][name] = tensor
        return split

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
        with torch.random.fork_rng(devices=[]):  # PEFT draws initial values, which are overwritten
            inject_adapter_in_model(config, root, ADAPTER_NAME)
        result = set_peft_model_state_dict(root, self.modules[name], ADAPTER_NAME)
        assert not result.unexpected_keys
        layer = root.get_submodule(name)
        assert isinstance(layer, BaseTunerLayer)
        layer.merge()
        return layer.get_base_layer().weight.detach() - weight.float()


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
            merged = weight.float()
            for other, factor in self.adapters:
                if name in other.modules:
                    merged = merged + factor * other.delta(name, module, weight)
            module.weight.copy_(merged)

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
