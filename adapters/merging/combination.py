"""Combining LoRAs into one by PEFT's methods."""

import math
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import yaml
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from torch import Tensor
from tqdm import tqdm

from adapters.arguments import check_seeds
from adapters.errors import UserError
from adapters.files.for_diffusers import AdaptedOnly, blank_weights
from adapters.files.info import AdapterInfo
from adapters.files.reading import lora_config, scaling
from adapters.files.stage_adapter import StageAdapter
from adapters.weights.kinds import AdapterSpec


class Method(NamedTuple):
    """What a method asks for, beside adapters and their scales."""

    pairs: bool = False
    """It combines A with A and B with B: their ranks must be equal."""
    prunes: bool = False
    """It keeps a part of the values: their density."""
    elects: bool = False
    """It keeps the values of one sign: how that is found."""
    cuts: bool = False
    """It combines B A, and cuts that off at a rank by SVD."""


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "linear": Method(pairs=True),
        "cat": Method(),
        "svd": Method(cuts=True),
        "ties": Method(pairs=True, prunes=True, elects=True),  # arXiv 2306.01708
        "ties_svd": Method(cuts=True, prunes=True, elects=True),
        "dare_linear": Method(pairs=True, prunes=True),  # arXiv 2311.03099
        "dare_linear_svd": Method(cuts=True, prunes=True),
        "dare_ties": Method(pairs=True, prunes=True, elects=True),
        "dare_ties_svd": Method(cuts=True, prunes=True, elects=True),
        "magnitude_prune": Method(pairs=True, prunes=True),
        "magnitude_prune_svd": Method(cuts=True, prunes=True),
    }
)
"""PEFT's methods, by its names.

The result of ``cat`` is the sum of updates, as merging all of them is, and that of ``svd`` the
nearest to it of a rank. Those that combine A with A and B with B are no such sum.
"""


def methods(**asks: bool) -> str:
    """The names of the methods that ask, or do not ask, for something."""
    return ", ".join(n for n, method in METHODS.items() if asks.items() <= method._asdict().items())


@dataclass(frozen=True)
class Combination:
    """A method of :data:`METHODS` and its settings."""

    method: str = "linear"
    density: float | None = None
    """The share of values that methods which prune keep, above 0 and up to 1."""
    rank: int | None = None
    """The rank that methods by SVD cut off at; ``None``: the largest of their adapters."""
    majority_sign: str | None = None
    """Whether a sign is elected by the ``total`` of values or their ``frequency``; ``None``: by
    the total."""
    seed: int = 0
    """Of the values that DARE drops, which are others on a GPU than on a CPU."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: where the method is unknown, lacks a setting, or would ignore one, or the
                seed is none.
        """
        check_seeds([self.seed])
        if self.method not in METHODS:
            raise UserError(f"method must be one of {', '.join(METHODS)} (got {self.method!r}).")
        asks = METHODS[self.method]
        share = self.density is not None and 0 < self.density <= 1
        rank = self.rank is None or self.rank >= 1
        sign = self.majority_sign in (None, "total", "frequency")
        for setting, asked, valid, expected in (
            ("density", asks.prunes, share, "above 0 and up to 1"),
            ("rank", asks.cuts, rank, "of 1 or more"),
            ("majority_sign", asks.elects, sign, "of total or frequency"),
        ):
            value = vars(self)[setting]
            if asked and not valid:
                raise UserError(f"{self.method!r} needs a {setting} {expected} (got {value!r}).")
            if value is not None and not asked:
                raise UserError(
                    f"{self.method!r} takes no {setting} (got {value!r}); leave it out."
                )


COMBINED = "combined"
"""What PEFT knows the result by."""


class Part(NamedTuple):
    """One adapter of a combination."""

    name: str
    """For messages."""
    adapter: StageAdapter
    scale: float

    @property
    def ranks(self) -> dict[str, int]:
        """By module."""
        state = self.adapter.state
        return {module: len(state[f"{module}.lora_A.weight"]) for module in self.adapter.modules}


def combined(
    parts: Sequence[Part], how: Combination, name: str, device: torch.device
) -> StageAdapter:
    """Combine adapters of one base.

    Args:
        parts: LoRAs and rsLoRAs; of a module that only some of them adapt, those are combined.
        how: the method.
        name: what to call the result.
        device: where to compute.

    Returns:
        A LoRA with alpha = rank.

    Raises:
        UserError: where PEFT or the method cannot combine them, naming what can.
    """
    modules = sorted({module for part in parts for module in part.adapter.modules})
    check(parts, how, modules)
    configs = {f"part_{index}": plain_lora(part) for index, part in enumerate(parts)}
    state: dict[str, Tensor] = {}
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []), torch.no_grad():
        torch.default_generator.manual_seed(how.seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(how.seed)
        for module in tqdm(modules, desc=f"Combining by {how.method}", leave=False, delay=1):
            state |= of_module(module, parts, how, configs, device)
    config = lora_config(state)
    config.base_model_name_or_path = parts[0].adapter.config.base_model_name_or_path
    config.inference_mode = True
    return StageAdapter(Path(name), info_of(parts, how, config), config, state)


def of_module(
    module: str,
    parts: Sequence[Part],
    how: Combination,
    configs: Mapping[str, LoraConfig],
    device: torch.device,
) -> dict[str, Tensor]:
    """PEFT's result for one module, on a model of nothing else.

    Args:
        module: its name.
        parts: all adapters; PEFT knows also of those that do not adapt it.
        how: the method.
        configs: those of the parts, by what PEFT knows them by.
        device: where to compute.
    """
    tensors = {
        index: part.adapter.modules[module]
        for index, part in zip(configs, parts, strict=True)
        if module in part.adapter.modules
    }
    first, *others = tensors
    skeleton = AdaptedOnly(blank_weights(tensors[first], device))
    narrowed = {index: copy(config) for index, config in configs.items()}
    for config in narrowed.values():
        config.target_modules = {module}
    with (
        torch.random.fork_rng(devices=[]),  # initial values, which are overwritten
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # others' own ranks
    ):
        model = LoraModel(skeleton, narrowed, first)
        for index in others:
            model.inject_adapter(skeleton, index)
    for index, own in tensors.items():
        set_peft_model_state_dict(skeleton, own, index)
    model.add_weighted_adapter(
        list(configs),
        [part.scale for part in parts],
        COMBINED,
        how.method,
        svd_rank=how.rank,
        svd_full_matrices=False,  # the others would be cut off
        density=how.density,
        majority_sign_method=how.majority_sign or "total",
    )
    state = get_peft_model_state_dict(skeleton, adapter_name=COMBINED)
    return {name: tensor.cpu().contiguous() for name, tensor in state.items()}


def plain_lora(part: Part) -> LoraConfig:
    """The configuration of a LoRA with the same scalings.

    The result has that of the first part but for its alpha, by which one of rsLoRAs would be scaled
    once more.
    """
    adapter = part.adapter
    assert isinstance(adapter.config, LoraConfig)
    alphas = {
        module: rank * scaling(adapter.config, adapter.state, module)
        for module, rank in part.ranks.items()
    }
    return lora_config(adapter.state, alphas)


def check(parts: Sequence[Part], how: Combination, modules: Sequence[str]) -> None:
    """Check the parts against each other, and what PEFT asks of them.

    Raises:
        UserError: as :func:`combined`.
    """
    for part in parts:
        if not part.adapter.has_factors or part.adapter.kind == "dora":
            raise UserError(
                f"{part.name!r} ({part.adapter.kind}) is more than the factors of a LoRA or rsLoRA,"
                f" which is what PEFT's methods ({', '.join(METHODS)}) combine; merge it beside"
                " others with set_adapters, which takes every kind."
            )
    largest = {part.name: max(part.ranks.values()) for part in parts}
    check_ranks(how, largest, "altogether")
    for module in modules:
        own = [part for part in parts if module in part.adapter.modules]
        check_ranks(how, {part.name: part.ranks[module] for part in own}, f"in {module}")
        shapes = {part.name: shape_of(part, module) for part in own}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{list(shape)} in {name!r}" for name, shape in shapes.items())
            raise UserError(f"These are of different models: {module} has the shape {found}.")
        check_cut(how, module, next(iter(shapes.values())), max(largest.values()))


def shape_of(part: Part, module: str) -> tuple[int, ...]:
    """The shape of the weight that a module has."""
    b, a = (part.adapter.state[f"{module}.lora_{side}.weight"] for side in "BA")
    return (len(b), *a.shape[1:])


def check_ranks(how: Combination, ranks: Mapping[str, int], where: str) -> None:
    """Check that ranks, by adapter, are equal where the method asks for it."""
    if METHODS[how.method].pairs and len(set(ranks.values())) > 1:
        found = ", ".join(f"{rank} in {name!r}" for name, rank in ranks.items())
        raise UserError(
            f"{how.method!r} combines A with A and B with B, so all must have one rank, but {where}"
            f" it is {found}; {methods(pairs=False)} take any."
        )


def check_cut(how: Combination, module: str, shape: tuple[int, ...], rank: int) -> None:
    """Check that a convolution has as many singular values as PEFT will ask for."""
    limit, rank = min(shape[0], math.prod(shape[1:])), how.rank or rank
    if METHODS[how.method].cuts and len(shape) > 2 and rank > limit:
        raise UserError(
            f"{how.method!r} cuts off at rank {rank}, and {module} has none above {limit}; give a"
            f" rank of {limit} or less, or take one of {methods(cuts=False)}."
        )


def info_of(parts: Sequence[Part], how: Combination, config: LoraConfig) -> AdapterInfo | None:
    """What the result says of itself; ``None``: none of its parts says anything."""
    infos = [part.adapter.info for part in parts if part.adapter.info is not None]
    if not infos:
        return None
    targets = {info.spec.targets for info in infos}
    same = len(targets) == 1 and len(infos) == len(parts)
    recipe = {
        "combined": {key: value for key, value in vars(how).items() if value is not None},
        "of": [
            {
                "adapter": str(part.adapter.folder),
                "scale": part.scale,
                "recipe": None if part.adapter.info is None else part.adapter.info.recipe,
            }
            for part in parts
        ],
    }
    return infos[0].model_copy(
        update={
            "spec": AdapterSpec(
                rank=max(config.r, *config.rank_pattern.values(), 0),
                targets=targets.pop() if same else tuple(config.target_modules),
            ),
            "prompts": tuple(dict.fromkeys(p for info in infos for p in info.prompts)),
            "step": max(info.step for info in infos),
            "recipe": yaml.safe_dump(recipe, sort_keys=False),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "approximation_error": None,
        }
    )
