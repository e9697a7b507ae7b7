"""The adapter of one stage: loading it, finding its base, and what it makes of each weight."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

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
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from adapters.base.signature import BaseSignature
from adapters.errors import UserError, listed
from adapters.files.info import HEADER_KEY, AdapterInfo, parse_info
from adapters.files.keys import module_of
from adapters.files.places import adapter_path, stage_folders
from adapters.files.reading import alpha_of, kind_of, rank_of, read_adapter, scaling
from adapters.files.validation import following_settings
from adapters.weights.kinds import ADAPTER_NAME
from adapters.weights.lycoris import LycorisConfig, Tensors, algorithm_of, weight_change
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

IN_FACTORS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"),
    *("init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "task_type"),
}
"""The settings of a ``LoraConfig`` that change nothing about a merged weight but its factors."""

SETTINGS: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
}
"""What the modules that adapters change are made of, beside weight and bias."""


@dataclass(frozen=True)
class StageAdapter:
    """The adapter of one stage, loaded: an exported one, or one that another tool wrote."""

    folder: Path
    """Its folder or file."""
    info: AdapterInfo | None
    """What it says of itself; ``None``: another tool wrote it."""
    config: PeftConfig | LycorisConfig
    state: dict[str, Tensor]
    """Its tensors under PEFT's names, or LyCORIS', without prefix, on the CPU."""

    @classmethod
    def load(cls, folder: Path) -> "StageAdapter":
        """Load a stage's folder, or a file of any style that :mod:`adapters.files.reading` knows.

        Raises:
            UserError: where it holds no adapter, or one with keys that are unknown or unpaired.
        """
        config, state, header = read_adapter(folder)
        info = parse_info(header, folder) if HEADER_KEY in header else None
        return cls(folder, info, config, state)

    @classmethod
    def load_all(cls, name: str | Path) -> list["StageAdapter"]:
        """Load the adapters of all stages in an exported folder, or a single one; also by hub name.

        Raises:
            UserError: as :meth:`load`.
        """
        return [cls.load(place) for place in stage_folders(adapter_path(name))]

    def __repr__(self) -> str:
        rank = vars(self.config)["r"] if self.info is None else self.info.spec.rank
        stage = "" if self.info is None else f"Stage {self.info.stage}, "
        size = sum(tensor.numel() for tensor in self.state.values())
        return (
            f"StageAdapter({str(self.folder)!r}, {stage}{self.kind} of rank {rank},"
            f" {len(self.modules)} modules, {size} parameters)"
        )

    @property
    def kind(self) -> str:
        """LoRA, rsLoRA or DoRA, or what PEFT or LyCORIS calls other kinds, in small letters."""
        return kind_of(self.config)

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
            if isinstance(self.config, LycorisConfig):
                unfit = [n for n in self.modules if not self._changes(n, present.get(n))]
                return [tensor for name in unfit for tensor in self.modules[name]]
            unknown = [name for name in self.modules if name not in present]
            if len(unknown) < len(self.modules):
                with following_settings(self.folder):
                    inject_adapter_in_model(self.config, unet, ADAPTER_NAME)
                # by its default PEFT asks the hub about the base's vocabulary
                needed = get_peft_model_state_dict(
                    unet, adapter_name=ADAPTER_NAME, save_embedding_layers=False
                )
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

    @cached_property
    def digest(self) -> str:
        """Of settings and tensors: orders adapters the same wherever and whenever they came."""
        settings = json.dumps(self.config.to_dict(), sort_keys=True, default=sorted)
        digest = hashlib.sha256(settings.encode())
        for name, tensor in sorted(self.state.items()):
            digest.update(name.encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def has_factors(self) -> bool:
        """Whether :class:`adapters.weights.updates.LowRank` is all that it does to a weight."""
        biases = any(name.endswith(".bias") for name in self.state)
        if biases or not isinstance(self.config, LoraConfig):
            return False
        own, usual = self.config.to_dict(), LoraConfig().to_dict()
        changed = {key for key, value in own.items() if value != usual[key]}
        start = own["init_lora_weights"]  # some others change the base too
        return changed <= IN_FACTORS and (isinstance(start, bool) or start == "gaussian")

    def update(self, name: str, module: nn.Module, weight: Tensor) -> Update:
        """What merging makes of a module's weight, as PEFT merges, in float32.

        Args:
            name: the module's full name.
            module: the module, for its settings.
            weight: its weight in the base, [out, in, ...].

        Raises:
            UserError: where its tensors do not fit the module, or it changes more than the weight.
        """
        tensors = self.modules[name]
        if f"{name}.lora_B.bias" in tensors:
            raise UserError(
                f"{self.folder} also changes biases ({name}.lora_B.bias), and only updates of"
                " weights can be merged here; train it without lora_bias, or load it with PEFT."
            )
        if not self.has_factors:
            by_formula = algorithm_of(self._parts(name)) and not isinstance(self.config, LoraConfig)
            change = self._by_formula if by_formula else self._by_peft
            added = in_order_of(weight, change(name, module, weight))
            return Dense(added.flatten(1).cpu())
        assert isinstance(self.config, LoraConfig)
        b, a = (tensors[f"{name}.lora_{side}.weight"] for side in "BA")
        if (len(b), *a.shape[1:]) != weight.shape:
            self._misfit(name, module)
        magnitude = tensors.get(f"{name}.lora_magnitude_vector")
        return low_rank(weight, b, a, scaling(self.config, self.state, name), magnitude)

    def delta(self, name: str, module: nn.Module, weight: Tensor) -> Tensor:
        """What merging adds to a module's weight, [out, in, ...] in float32; see :meth:`update`."""
        return delta(weight, self.update(name, module, weight))

    def _parts(self, name: str) -> Tensors:
        """The tensors of a module without its name in theirs."""
        own = self.modules[name]
        return {tensor.removeprefix(f"{name}."): values for tensor, values in own.items()}

    def _changes(self, name: str, module: nn.Module | None) -> bool:
        """Whether the tensors of a module fit it, by their shapes."""
        if not isinstance(module, nn.Linear | nn.Conv2d):
            return False
        try:
            change = weight_change(self._parts(name), module.weight, 1.0)
        except RuntimeError:
            return False
        return change.shape == module.weight.shape

    def _by_formula(self, name: str, module: nn.Module, weight: Tensor) -> Tensor:
        """What LyCORIS' formulas, which are also PEFT's of a LoHa and LoKr, add to a weight."""
        alpha, rank = alpha_of(self.config, name), rank_of(self.config, name)
        assert alpha is not None
        try:
            change = weight_change(self._parts(name), weight, alpha / rank if rank else alpha)
        except RuntimeError:  # of tensors of another shape
            self._misfit(name, module)
        if change.shape != weight.shape:
            self._misfit(name, module)
        return change

    def _by_peft(self, name: str, module: nn.Module, weight: Tensor) -> Tensor:
        """What PEFT's own merge adds to a weight, in float32."""
        assert not isinstance(self.config, LycorisConfig)
        root = _alone(name, _plain(module, weight))
        config = copy(self.config)
        config.target_modules = {name}  # PEFT would shorten many names to ambiguous endings
        for field_name in vars(config).keys() & {"rank_pattern", "alpha_pattern"}:  # OFT has none
            patterns = vars(config)[field_name]
            vars(config)[field_name] = {
                p: v for p, v in patterns.items() if get_pattern_key([p], name) == p
            }
        with torch.random.fork_rng(devices=[]), following_settings(self.folder):
            inject_adapter_in_model(config, root, ADAPTER_NAME)  # draws values to overwrite
        try:
            result = set_peft_model_state_dict(root, self.modules[name], ADAPTER_NAME)
        except RuntimeError:  # of a tensor of another shape
            self._misfit(name, module)
        mark = f"{name}.{PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]}"
        missing = [key for key in result.missing_keys if key.startswith(mark)]
        if missing or result.unexpected_keys:
            self._misfit(name, module, [key.replace(f".{ADAPTER_NAME}", "") for key in missing])
        layer = root.get_submodule(name)
        assert isinstance(layer, BaseTunerLayer)
        with following_settings(self.folder):
            layer.merge()
        return layer.get_base_layer().weight.detach().sub_(weight)

    def _misfit(self, name: str, module: nn.Module, missing: Sequence[str] = ()) -> NoReturn:
        if missing:
            raise UserError(
                f"{self.folder} is not whole: of {name} it lacks {listed(missing)}; fetch or export"
                " it again."
            )
        shapes = {tensor: list(values.shape) for tensor, values in self.modules[name].items()}
        raise UserError(
            f"{self.folder} does not fit {name}, a {module}: its tensors have the shapes {shapes};"
            " load the model that it was trained on."
        )


def _plain(module: nn.Module, weight: Tensor) -> nn.Module:
    """A module with the settings of another and a copy of a weight in float32, without bias."""
    kind = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    settings = {name: vars(module)[name] for name in SETTINGS[kind]}
    plain: nn.Module = kind(**settings, bias=False, device="meta")
    copied = weight.to(torch.float32, copy=True)  # PEFT merges in place
    plain.weight = nn.Parameter(copied, requires_grad=False)
    return plain


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
    on = [each for each in adapters if name in each[0].modules and each[1]]
    if len(on) > 1:
        on.sort(key=lambda each: (each[0].digest, each[1]))
    terms = [Term(scale, adapter.update(name, module, weight)) for adapter, scale in on]
    if not terms:
        return weight.to(torch.float32, copy=True)
    return in_shape_of(weight, merge(as_matrix(weight), terms))


def _alone(name: str, module: nn.Module) -> nn.Module:
    """A model in which a module stands alone under its full name, as PEFT matches by name."""
    for part in reversed(name.split(".")):
        parent = nn.Module()
        parent.add_module(part, module)
        module = parent
    return module
