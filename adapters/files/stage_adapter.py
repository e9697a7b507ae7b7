"""The adapter of one stage: loading it, finding its base, and its update of each weight."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from adapters.base.signature import BaseSignature
from adapters.errors import UserError, listed
from adapters.files.for_diffusers import AdaptedOnly
from adapters.files.info import HEADER_KEY, AdapterInfo, parse_info
from adapters.files.keys import by_module, by_name
from adapters.files.places import adapter_path, stage_folders
from adapters.files.reading import alpha_of, kind_of, rank_of, read_adapter, scaling
from adapters.files.settings import IN_FACTORS
from adapters.files.validation import explain_peft_errors
from adapters.weights.kinds import ADAPTER_NAME
from adapters.weights.lycoris import LycorisConfig, algorithm_of, weight_change
from adapters.weights.updates import (
    Dense,
    Term,
    Update,
    as_matrix,
    delta,
    in_order_of,
    in_shape_of,
    low_rank,
    merge,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageAdapter:
    """A loaded adapter of one stage, exported here or written by another tool."""

    folder: Path
    """Its folder or file."""
    info: AdapterInfo | None
    """Its description of itself; ``None``: another tool wrote it."""
    config: PeftConfig | LycorisConfig
    state: dict[str, Tensor]
    """Its tensors under PEFT's or LyCORIS' names, without prefix, on the CPU."""

    @classmethod
    def load(cls, folder: Path) -> "StageAdapter":
        """Load a stage's folder, or a file of any style, with :func:`read_adapter`."""
        config, state, header = read_adapter(folder)
        info = parse_info(header, folder) if HEADER_KEY in header else None
        return cls(folder, info, config, state)

    @classmethod
    def load_all(cls, name: str | Path) -> list["StageAdapter"]:
        """Load the adapters of all stages of an export, or a single adapter; also by hub name."""
        return [cls.load(place) for place in stage_folders(adapter_path(name))]

    def __repr__(self) -> str:
        rank = self.config.r if self.info is None else self.info.spec.rank
        stage = "" if self.info is None else f"Stage {self.info.stage}, "
        return (
            f"StageAdapter({str(self.folder)!r}, {stage}{self.kind} of rank {rank},"
            f" {len(self.modules)} modules, {self.parameters} parameters)"
        )

    @property
    def kind(self) -> str:
        """The kind, as :func:`adapters.files.reading.kind_of` names it."""
        return kind_of(self.config)

    @cached_property
    def modules(self) -> dict[str, dict[str, Tensor]]:
        """Its tensors by module, under their names without the module's."""
        return by_module(self.state)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The modules' ranks, see :func:`adapters.files.reading.rank_of`."""
        return {name: rank_of(self.config, name) for name in self.modules}

    @cached_property
    def alphas(self) -> dict[str, float | None]:
        """The modules' alphas, see :func:`adapters.files.reading.alpha_of`."""
        return {name: alpha_of(self.config, name) for name in self.modules}

    @property
    def parameters(self) -> int:
        """The number of its parameters."""
        return sum(tensor.numel() for tensor in self.state.values())

    def stage_among(self, configs: Mapping[int, Mapping[str, Any]]) -> int:
        """Find the stage it belongs to: the one it names, or the only one whose UNet it fits.

        Raises:
            UserError: if it names none, and fits either no UNet of these configurations (what does
                not fit is listed) or both.
        """
        if self.info is not None:
            return self.info.stage
        misfits = {stage: self.misfits(config) for stage, config in configs.items()}
        fitting = [stage for stage, names in misfits.items() if not names]
        if len(fitting) > 1:
            raise UserError(
                f"{self.folder} does not say which stage it belongs to, and fits both Stages"
                f" {' and '.join(map(str, fitting))}; load it where only its own stage is loaded."
            )
        if not fitting:
            nearest = min(misfits, key=lambda stage: len(misfits[stage]))
            raise UserError(
                f"{self.folder} fits no UNet here by the names and shapes of its"
                f" {len(self.state)} tensors; for Stage {nearest}, the nearest, these are unknown,"
                f" missing or of another shape: {listed(misfits[nearest])}; load the model that it"
                " was trained on."
            )
        return fitting[0]

    def misfits(self, config: Mapping[str, Any]) -> list[str]:
        """List the tensors that do not fit a configuration's UNet, and those that it would lack."""
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
            present = dict(unet.named_modules())
            if isinstance(self.config, LycorisConfig):
                unfit = [name for name in self.modules if not self._fits(name, present.get(name))]
                return [f"{name}.{part}" for name in unfit for part in self.modules[name]]
            needed = {}
            if self.modules.keys() & present.keys():
                with explain_peft_errors(self.folder):
                    inject_adapter_in_model(self.config, unet, ADAPTER_NAME)
                # by default PEFT asks the hub about the base's vocabulary
                needed = get_peft_model_state_dict(
                    unet, adapter_name=ADAPTER_NAME, save_embedding_layers=False
                )
        names = dict.fromkeys([*self.state, *needed])
        both = self.state.keys() & needed.keys()
        return [n for n in names if n not in both or self.state[n].shape != needed[n].shape]

    def check_base(self, base: BaseSignature, name: str) -> None:
        """Raise a UserError if it was trained on another base; warn if it does not say which."""
        if self.info is None or self.info.base_signature is None:
            logger.warning(
                "%s does not say which base it was trained on; it fits %s by names and shapes.",
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

    @cached_property
    def digest(self) -> str:
        """A digest of settings and tensors, to order adapters the same however they were loaded."""
        settings = json.dumps(self.config.to_dict(), sort_keys=True, default=sorted)
        digest = hashlib.sha256(settings.encode())
        for name, tensor in sorted(self.state.items()):
            digest.update(name.encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def has_factors(self) -> bool:
        """True if it changes weights only by a :class:`adapters.weights.updates.LowRank`."""
        biases = any(name.endswith(".bias") for name in self.state)
        if biases or not isinstance(self.config, LoraConfig):
            return False
        own, usual = self.config.to_dict(), LoraConfig().to_dict()
        changed = {key for key, value in own.items() if value != usual[key]}
        start = own["init_lora_weights"]  # some other initialisations change the base too
        return changed <= IN_FACTORS and (isinstance(start, bool) or start == "gaussian")

    def update(self, name: str, weight: Tensor) -> Update:
        """Compute the update by which merging changes a module's weight, as PEFT merges.

        Raises:
            UserError: if its tensors do not fit the weight, or it changes more than the weight.
        """
        tensors = self.modules[name]
        if "lora_B.bias" in tensors:
            raise UserError(
                f"{self.folder} also changes biases ({name}.lora_B.bias), but only updates of"
                " weights can be merged here; train it without lora_bias, or load it with PEFT."
            )
        if not self.has_factors:
            formula = algorithm_of(tensors) and not isinstance(self.config, LoraConfig)
            added = (self._by_formula if formula else self._by_peft)(name, weight)
            return Dense(in_order_of(weight, added).flatten(1).cpu())
        b, a = (tensors[f"lora_{side}.weight"] for side in "BA")
        if (len(b), *a.shape[1:]) != weight.shape:
            raise self._misfit(name, weight)
        magnitude = tensors.get("lora_magnitude_vector")
        return low_rank(weight, b, a, scaling(self.config, name), magnitude)

    def delta(self, name: str, weight: Tensor) -> Tensor:
        """Compute what merging adds to a module's weight, [out, in, ...], in float32."""
        return delta(weight, self.update(name, weight))

    def _fits(self, name: str, module: nn.Module | None) -> bool:
        """Tell from their shapes whether LyCORIS' tensors fit a module."""
        if not isinstance(module, nn.Linear | nn.Conv2d):
            return False
        try:
            weight_change(self.modules[name], module.weight, 1.0)
        except RuntimeError:
            return False
        return True

    def _by_formula(self, name: str, weight: Tensor) -> Tensor:
        """Compute what LyCORIS' formulas add, which are also PEFT's for LoHa and LoKr."""
        alpha, rank = self.alphas[name], self.ranks[name]
        assert alpha is not None
        try:
            return weight_change(self.modules[name], weight, alpha / rank if rank else alpha)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._misfit(name, weight) from error

    def _by_peft(self, name: str, weight: Tensor) -> Tensor:
        """Compute what PEFT's own merge adds, in float32."""
        assert not isinstance(self.config, LycorisConfig)
        root = AdaptedOnly({name: weight.to(torch.float32, copy=True)})  # PEFT merges in place
        config = copy(self.config)
        config.target_modules = {name}  # PEFT would shorten many names to ambiguous endings
        if isinstance(config, LoraConfig):
            config.r, config.rank_pattern = self.ranks[name], {}
            config.lora_alpha, config.alpha_pattern = self.alphas[name], {}
        with torch.random.fork_rng(devices=[]), explain_peft_errors(self.folder):
            inject_adapter_in_model(config, root, ADAPTER_NAME)  # draws values, overwritten below
        try:
            result = set_peft_model_state_dict(root, self._tensors(name), ADAPTER_NAME)
        except RuntimeError as error:  # a tensor has another shape
            raise self._misfit(name, weight) from error
        mark = f"{name}.{PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]}"
        missing = [key for key in result.missing_keys if key.startswith(mark)]
        if missing:
            names = [key.replace(f".{ADAPTER_NAME}", "") for key in missing]
            raise UserError(
                f"{self.folder} is incomplete: {name} lacks {listed(names)}; fetch or export it"
                " again."
            )
        if result.unexpected_keys:
            raise self._misfit(name, weight)
        layer = root.get_submodule(name)
        assert isinstance(layer, BaseTunerLayer)
        with explain_peft_errors(self.folder):
            layer.merge()
        return layer.get_base_layer().weight.detach().sub_(weight)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        return by_name({name: self.modules[name]})

    def _misfit(self, name: str, weight: Tensor) -> UserError:
        shapes = {tensor: list(values.shape) for tensor, values in self._tensors(name).items()}
        return UserError(
            f"{self.folder} does not fit {name}, a weight of {list(weight.shape)}: its tensors have"
            f" the shapes {shapes}; load the model that it was trained on."
        )


def merged_weight(
    adapters: Sequence[tuple[StageAdapter, float]], name: str, weight: Tensor
) -> Tensor:
    """Merge adapters, each with its scale, into a copy of a module's weight, in float32."""
    on = [each for each in adapters if name in each[0].modules and each[1]]
    if len(on) > 1:
        on.sort(key=lambda each: (each[0].digest, each[1]))  # a sum's rounding depends on its order
    terms = [Term(scale, adapter.update(name, weight)) for adapter, scale in on]
    if not terms:
        return weight.to(torch.float32, copy=True)
    return in_shape_of(weight, merge(as_matrix(weight), terms))
