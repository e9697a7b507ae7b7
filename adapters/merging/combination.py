"""Combining LoRAs into one by PEFT's methods."""

import math
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from torch import Tensor

from adapters.arguments import STAGES, Scale, split_scale
from adapters.errors import UserError
from adapters.files.for_diffusers import AdaptedOnly, blank_weights
from adapters.files.info import AdapterInfo
from adapters.files.keys import by_name
from adapters.files.reading import lora_config, scaling
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.methods import METHODS, Combination
from adapters.progress import Bar
from adapters.weights.kinds import AdapterSpec

COMBINED = "combined"
"""The name of the result within PEFT."""


class Part(NamedTuple):
    """One adapter of a combination."""

    name: str
    """Its name in messages."""
    adapter: StageAdapter
    scale: float

    def shape_of(self, module: str) -> tuple[int, ...]:
        """Return the shape of a module's weight."""
        b, a = (self.adapter.modules[module][f"lora_{side}.weight"] for side in "BA")
        return (len(b), *a.shape[1:])


def load_parts(adapters: Sequence[tuple[str, Scale]], stage: int | None) -> dict[int, list[Part]]:
    """Load the adapters of a combination, by stage; those with the scale 0 take no part.

    Raises:
        UserError: if one cannot be read, belongs to another base than the others or has no known
            stage, or all have the scale 0.
    """
    stages: dict[int, list[Part]] = {}
    for folder, scale in adapters:
        own = {_find_stage(adapter, stage): adapter for adapter in StageAdapter.load_all(folder)}
        for number, factor in split_scale(scale, own, STAGES, folder).items():
            if factor:
                stages.setdefault(number, []).append(Part(folder, own[number], factor))
    if not stages:
        raise UserError("There is nothing to combine; give adapters scales other than 0.")
    for parts in stages.values():
        _check_bases(parts)
    return stages


def _find_stage(adapter: StageAdapter, otherwise: int | None) -> int:
    stage = otherwise if adapter.info is None else adapter.info.stage
    if stage is None:
        raise UserError(f"{adapter.folder} does not say which stage it belongs to; give --stage.")
    return stage


def _check_bases(parts: Sequence[Part]) -> None:
    """Check that all adapters that state the base they were trained on state the same."""
    infos = [part.adapter.info for part in parts if part.adapter.info is not None]
    signed = [(info, info.base_signature) for info in infos if info.base_signature is not None]
    for info, signature in signed[1:]:
        first, base = signed[0]
        if difference := signature.difference(base):
            raise UserError(
                f"The Stage {info.stage} adapters were trained on different bases,"
                f" {first.base_model!r} and {info.base_model!r} ({difference}); combine those of"
                " one base."
            )


def combine(
    parts: Sequence[Part], how: Combination, name: str, device: torch.device
) -> StageAdapter:
    """Combine LoRAs and rsLoRAs of one base into a LoRA with alpha = rank, module by module.

    Raises:
        UserError: if PEFT or the method cannot combine them, naming what can.
    """
    modules = sorted({module for part in parts for module in part.adapter.modules})
    _check_parts(parts, how, modules)
    configs = {f"part_{index}": _plain_config(part) for index, part in enumerate(parts)}
    state: dict[str, Tensor] = {}
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []), torch.no_grad():
        torch.default_generator.manual_seed(how.seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(how.seed)
        for module in Bar(modules, desc=f"Combining by {how.method}", leave=False, delay=1):
            state |= _combine_module(module, parts, how, configs, device)
    config = lora_config(state)
    config.base_model_name_or_path = parts[0].adapter.config.base_model_name_or_path
    config.inference_mode = True
    return StageAdapter(Path(name), _describe(parts, how, config), config, state)


def _combine_module(
    module: str,
    parts: Sequence[Part],
    how: Combination,
    configs: Mapping[str, LoraConfig],
    device: torch.device,
) -> dict[str, Tensor]:
    """Combine one module by PEFT, on a model that has no other.

    ``configs`` are those of all parts by their names within PEFT, which must know even the parts
    that do not adapt the module.
    """
    tensors = {
        index: by_name({module: part.adapter.modules[module]})
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
        svd_full_matrices=False,  # the other vectors would be cut off
        density=how.density,
        majority_sign_method=how.majority_sign or "total",
    )
    state = get_peft_model_state_dict(skeleton, adapter_name=COMBINED)
    return {name: tensor.cpu().contiguous() for name, tensor in state.items()}


def _plain_config(part: Part) -> LoraConfig:
    """Build the configuration of a LoRA with the same scalings.

    PEFT gives the result the first part's configuration except for its alpha; if that is an
    rsLoRA's, it would scale the result once more.
    """
    adapter = part.adapter
    alphas = {name: rank * scaling(adapter.config, name) for name, rank in adapter.ranks.items()}
    return lora_config(adapter.state, alphas)


def _check_parts(parts: Sequence[Part], how: Combination, modules: Sequence[str]) -> None:
    """Check the parts against each other and against PEFT's requirements."""
    for part in parts:
        if not part.adapter.has_factors or part.adapter.kind == "dora":
            raise UserError(
                f"{part.name!r} ({part.adapter.kind}) cannot be combined, as PEFT's methods"
                f" ({', '.join(METHODS)}) take only the factors of LoRAs and rsLoRAs; merge it with"
                " the others by set_adapters, which takes every kind."
            )
    largest = {part.name: max(part.adapter.ranks.values()) for part in parts}
    _check_ranks(how, largest, "overall")
    for module in modules:
        own = [part for part in parts if module in part.adapter.modules]
        _check_ranks(how, {part.name: part.adapter.ranks[module] for part in own}, f"in {module}")
        shapes = {part.name: part.shape_of(module) for part in own}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{list(shape)} in {name!r}" for name, shape in shapes.items())
            raise UserError(
                f"These adapters are for different models, as {module} has the shape {found};"
                " combine those of one model."
            )
        rows, *columns = next(iter(shapes.values()))
        # PEFT takes that many singular values of a convolution, which may have fewer
        limit, rank = min(rows, math.prod(columns)), how.rank or max(largest.values())
        if how.asks.cuts and len(columns) > 1 and rank > limit:
            raise UserError(
                f"{how.method!r} cuts off at rank {rank}, but {module} has at most {limit}; give a"
                f" rank of {limit} or less, or use one of {_list_methods(cuts=False)}."
            )


def _check_ranks(how: Combination, ranks: Mapping[str, int], where: str) -> None:
    """Check that ranks, by adapter, are equal if the method requires it."""
    if how.asks.pairs and len(set(ranks.values())) > 1:
        found = ", ".join(f"{rank} in {name!r}" for name, rank in ranks.items())
        raise UserError(
            f"{how.method!r} combines A with A and B with B, so all ranks must be equal, but"
            f" {where} they are {found}; {_list_methods(pairs=False)} take any."
        )


def _list_methods(**asks: bool) -> str:
    return ", ".join(n for n, method in METHODS.items() if asks.items() <= method._asdict().items())


def _describe(parts: Sequence[Part], how: Combination, config: LoraConfig) -> AdapterInfo | None:
    """Build the information of the result; ``None``: none of its parts has any."""
    infos = [part.adapter.info for part in parts if part.adapter.info is not None]
    if not infos:
        return None
    targets = {info.spec.targets for info in infos}
    same = len(targets) == 1 and len(infos) == len(parts)
    recipe = {
        "combined": {key: value for key, value in asdict(how).items() if value is not None},
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
            "created": None,
            "approximation_error": None,
        }
    )
