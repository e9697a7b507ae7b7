"""Reading any tool's adapters: their tensors, and the settings to interpret them by."""

import logging
from collections import Counter
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TypeVar

from peft import LoraConfig, OFTConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.errors import UserError
from adapters.files.info import HEADER_KEY
from adapters.files.keys import by_module, by_name, rename_tensors
from adapters.files.places import PEFT_CONFIG, PEFT_WEIGHTS, find_weights
from adapters.files.settings import read_config, resolve_patterns
from adapters.files.validation import check_modules, check_values, check_whole, full_targets
from adapters.weights.lycoris import (
    ALGORITHMS,
    WHOLE_MATRICES,
    LycorisConfig,
    Tensors,
    algorithm_of,
    with_peft_magnitude,
)

logger = logging.getLogger(__name__)

Number = TypeVar("Number", int, float)


def read_adapter(
    path: Path,
) -> tuple[PeftConfig | LycorisConfig, dict[str, Tensor], dict[str, str]]:
    """Read an adapter from a safetensors file, or a folder that holds one.

    Rank and alpha come from the tensors, ``adapter_config.json`` (next to PEFT's file), the
    header's ``lora_adapter_metadata`` or ``if_adapter``, or ``.alpha`` tensors; otherwise alpha is
    the rank, as in diffusers, with a warning if PEFT's file lacks its configuration.

    Returns:
        PEFT's configuration with full module names, or the settings of a LyCORIS file; the tensors
        under PEFT's or LyCORIS' names, without prefix
        (``mid_block.attentions.0.to_q.lora_A.weight``); and the file's header.

    Raises:
        UserError: if the file cannot be read, has unknown keys, keys without their counterpart or
            values that are not finite, or lacks tensors that its configuration names.
    """
    file = find_weights(path)
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); fetch or export it again.") from error
    config = read_config(file, header)
    named = rename_tensors(tensors, file)
    check_values(tensors, file)
    alphas = {
        name.removesuffix(".alpha"): float(named.pop(name))
        for name in list(named)
        if name.endswith(".alpha")
    }
    own = check_modules(by_module(named), alphas, file)
    modules = {name: with_peft_magnitude(tensors) for name, tensors in own.items()}
    if config is None and _is_lycoris(modules, alphas):
        return _lycoris_config(own, alphas), by_name(own), header
    if config is not None:
        resolve_patterns(config, [*modules, *full_targets(config)], file)
    check_whole(config, modules, file)
    state = by_name(modules)
    if file.name == PEFT_WEIGHTS and not (config or alphas or HEADER_KEY in header):
        logger.warning("%s has no %s next to it: alpha is taken to be the rank.", file, PEFT_CONFIG)
    if config is not None:  # what was left out has no tensors
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    if config is None or isinstance(config, LoraConfig):
        return lora_config(state, alphas, config), state, header
    _check_ranks(config, modules, file)
    config.target_modules = list(modules)
    return config, state, header


def _is_lycoris(modules: Mapping[str, Tensors], alphas: Mapping[str, float]) -> bool:
    """Tell whether LyCORIS' formulas apply to tensors without a configuration."""
    algorithms = {name: algorithm_of(own) for name, own in modules.items()}
    if all(
        algorithms[name] is ALGORITHMS["lora_"] and "dora_scale" not in own
        for name, own in modules.items()
    ):
        return False  # a LoRA or DoRA of PEFT
    return all(
        algorithm is not None and (name in alphas or not algorithm.alpha)
        for name, algorithm in algorithms.items()
    )


def _check_ranks(config: PeftConfig, modules: Mapping[str, Tensors], file: Path) -> None:
    """Check that a LoHa or LoKr has the ranks that its configuration states and scales by."""
    for name, tensors in modules.items():
        algorithm = algorithm_of(tensors)
        if algorithm is None or tensors.keys() >= WHOLE_MATRICES:
            continue  # PEFT's OFT, which does not scale by rank; whole matrices, which may have any
        stated, found = rank_of(config, name), algorithm.rank(tensors)
        if stated != found:
            raise UserError(
                f"{file} has tensors of rank {found} for {name}, but its configuration states"
                f" {stated}; put the {PEFT_CONFIG} that it was saved with next to it."
            )


def _lycoris_config(modules: Mapping[str, Tensors], alphas: Mapping[str, float]) -> LycorisConfig:
    """Gather the settings of a LyCORIS file; alpha is the rank by default (OFT: 0)."""
    algorithms = {n: found for n, own in modules.items() if (found := algorithm_of(own))}
    ranks = {name: algorithm.rank(modules[name]) for name, algorithm in algorithms.items()}
    scaled = {
        # the library ignores alpha if both matrices are whole
        name: rank if modules[name].keys() >= WHOLE_MATRICES else alphas.get(name, rank)
        for name, rank in ranks.items()
    }
    r, rank_pattern = _most_and_others(ranks)
    alpha, alpha_pattern = _most_and_others(scaled)
    kinds = "+".join(sorted({algorithm.kind for algorithm in algorithms.values()}))
    return LycorisConfig(kinds, r, alpha, rank_pattern, alpha_pattern, list(modules))


def lora_config(
    state: Mapping[str, Tensor],
    alphas: Mapping[str, float] | None = None,
    stored: LoraConfig | None = None,
) -> LoraConfig:
    """Build the configuration of LoRA tensors, with full names, and each module's rank and alpha.

    An alpha is that of ``alphas``, or else of the ``stored`` configuration, or else the rank.
    """
    config = LoraConfig() if stored is None else copy(stored)
    ranks = {name: len(own["lora_A.weight"]) for name, own in by_module(state).items()}
    known = alphas or {}
    by_name = {
        name: known.get(name, rank if stored is None else _lora_alpha(stored, name))
        for name, rank in ranks.items()
    }
    config.r, config.rank_pattern = _most_and_others(ranks)
    config.lora_alpha, config.alpha_pattern = _most_and_others(by_name)
    config.use_dora = any(name.endswith("lora_magnitude_vector") for name in state)
    config.target_modules = list(ranks)
    return config


def scaling(config: LoraConfig, module: str) -> float:
    """Return the factor by which PEFT multiplies a module's B A."""
    rank = rank_of(config, module)
    return _lora_alpha(config, module) / (rank**0.5 if config.use_rslora else rank)


def kind_of(config: PeftConfig | LycorisConfig) -> str:
    """Name an adapter's kind: a key of ``weights.kinds.KINDS``, or a LyCORIS file's algorithms."""
    if isinstance(config, LycorisConfig):
        return config.kind
    if not isinstance(config, LoraConfig):
        return str(config.peft_type.value).lower()
    return "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"


def rank_of(config: PeftConfig | LycorisConfig, module: str) -> int:
    """Return a module's rank (PEFT's OFT: the number of blocks; 0: its algorithm has none)."""
    if isinstance(config, OFTConfig):
        return int(config.r)
    return int(_of_module(config.rank_pattern, module, config.r))


def alpha_of(config: PeftConfig | LycorisConfig, module: str) -> float | None:
    """Return a module's alpha; ``None``: its kind has none."""
    if isinstance(config, OFTConfig):
        return None
    if isinstance(config, LoraConfig):
        return _lora_alpha(config, module)
    return _of_module(config.alpha_pattern, module, config.alpha)


def _lora_alpha(config: LoraConfig, module: str) -> float:
    return _of_module(config.alpha_pattern, module, config.lora_alpha)


def _of_module(own: Mapping[str, Number], module: str, others: Number) -> Number:
    """Return a module's own value, by its full name, or else ``others``."""
    return own.get(module, others)


def _most_and_others(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """Return the most common value, and all other values by name."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {name: value for name, value in values.items() if value != most}
