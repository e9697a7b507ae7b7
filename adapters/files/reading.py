"""Reading adapters of any tool: their tensors, and the settings that say what these mean."""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.errors import UserError
from adapters.files.info import HEADER_KEY, parse_info
from adapters.files.keys import modules_of, parts_of, rename_tensors, tensors_of
from adapters.files.places import PEFT_WEIGHTS, find_weights
from adapters.files.validation import (
    PEFT_ERRORS,
    PEFT_TYPES,
    check_ranks,
    check_settings,
    check_values,
    check_whole,
    whole_modules,
)
from adapters.weights.kinds import KINDS, AdapterSpec
from adapters.weights.lycoris import (
    ALGORITHMS,
    HALVES,
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

    Rank and alpha come from the tensors, ``adapter_config.json`` (beside PEFT's file), the header's
    ``lora_adapter_metadata`` or ``if_adapter``, or ``.alpha`` tensors; where none says, alpha is
    the rank, as diffusers takes it; a warning says so where PEFT's file lacks its configuration.

    Returns:
        PEFT's configuration with whole module names, or that of a file of LyCORIS that has none;
        the tensors under the names that PEFT, or LyCORIS, has for them without prefix
        (``mid_block.attentions.0.to_q.lora_A.weight``); and the file's header.

    Raises:
        UserError: where the file cannot be read, has keys that are unknown or lack their other
            half, values that are no finite numbers, or not all that its configuration speaks of.
    """
    file = find_weights(path)
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); fetch or export it again.") from error
    config = stored_config(file, header)
    named = rename_tensors(tensors, file)
    check_values(tensors, file)
    alphas = {
        name.removesuffix(".alpha"): float(named.pop(name))
        for name in list(named)
        if name.endswith(".alpha")
    }
    modules = whole_modules(tensors_of(named), alphas, file)
    if config is None and is_lycoris(modules, alphas):
        return lycoris_config(modules, alphas), joined(modules), header
    state = joined({name: with_peft_magnitude(own) for name, own in modules.items()})
    check_whole(config, parts_of(state), file)
    if file.name == PEFT_WEIGHTS and not (config or alphas or HEADER_KEY in header):
        logger.warning("%s has no %s beside it: alpha is taken as its rank.", file, CONFIG_NAME)
    if config is None or isinstance(config, LoraConfig):
        return lora_config(state, alphas, config), state, header
    check_ranks(config, modules, file)
    config.target_modules = list(modules)
    return config, state, header


def is_lycoris(modules: Mapping[str, Tensors], alphas: Mapping[str, float]) -> bool:
    """Whether tensors without a configuration mean all that they do by LyCORIS' formulas alone."""
    algorithms = {name: algorithm_of(own) for name, own in modules.items()}
    plain = all(
        algorithm is ALGORITHMS["lora_"] and "dora_scale" not in with_peft_magnitude(modules[name])
        for name, algorithm in algorithms.items()
    )
    return not plain and all(
        algorithm is not None and (name in alphas or not algorithm.alpha)
        for name, algorithm in algorithms.items()
    )


def joined(modules: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """The tensors of all modules by their full names."""
    return {f"{name}.{part}": t for name, own in modules.items() for part, t in own.items()}


def stored_config(file: Path, header: Mapping[str, str]) -> PeftConfig | None:
    """The configuration that a file brings along; ``None``: none.

    Raises:
        UserError: where it is damaged.
    """
    beside = file.parent / CONFIG_NAME
    own = file.name == PEFT_WEIGHTS and beside.exists()
    try:
        if own:
            check_type(json.loads(beside.read_text(encoding="utf-8")))
            config = PeftConfig.from_pretrained(str(file.parent))
        elif LORA_ADAPTER_METADATA_KEY in header:
            config = header_config(json.loads(header[LORA_ADAPTER_METADATA_KEY]))
        elif HEADER_KEY in header:
            return signed_config(parse_info(header, file).spec)
        else:
            return None
        if config is not None:
            check_settings(config)
    except (*PEFT_ERRORS, OSError) as error:
        where = beside if own else f"{LORA_ADAPTER_METADATA_KEY} of {file}"
        raise UserError(
            f"{where} is no PEFT configuration of a UNet's adapter ({error}); correct it, or"
            " export again."
        ) from error
    return config


def signed_config(spec: AdapterSpec) -> PeftConfig | None:
    """The configuration that a spec means; ``None``: a LoRA with each module's rank as alpha."""
    if spec.kind == "lora" and spec.alpha is None:
        return None
    kind = KINDS[spec.kind]
    return kind.config(**kind.fields(spec))


def check_type(settings: Any) -> None:
    """Raise a ValueError where JSON is no configuration of a kind that a UNet takes here."""
    found = settings.get("peft_type") if isinstance(settings, dict) else settings
    if not isinstance(found, str) or found not in PEFT_TYPES:
        raise ValueError(f"its peft_type should be one of {', '.join(PEFT_TYPES)}, not {found!r}")


def header_config(settings: Any) -> PeftConfig | None:
    """The UNet's configuration in the JSON of a header; ``None``: it is of another model.

    Pipelines write ``unet.r``, ``UNet2DConditionModel.save_lora_adapter`` writes ``r``.

    Raises:
        ValueError: where it has another form, or a type that no UNet takes here.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"it should be settings by name, not {settings!r}")
    own = {key.removeprefix("unet."): v for key, v in settings.items() if key.startswith("unet.")}
    own = own or {key: value for key, value in settings.items() if "." not in key}
    if not own:
        return None
    check_type(typed := {"peft_type": "LORA"} | own)
    return PEFT_TYPES[typed["peft_type"]](**own)


def lycoris_config(modules: Mapping[str, Tensors], alphas: Mapping[str, float]) -> LycorisConfig:
    """The configuration of a file of LyCORIS, by module.

    Args:
        modules: the tensors of each module.
        alphas: alpha of some modules; the others' is their rank (OFT: no constraint).
    """
    algorithms = {
        name: algorithm for name, own in modules.items() if (algorithm := algorithm_of(own))
    }
    ranks = {name: algorithm.rank(modules[name]) for name, algorithm in algorithms.items()}
    scaled = {name: alphas.get(name, rank) for name, rank in ranks.items()}
    # of two whole matrices the library takes no alpha
    scaled |= {name: ranks[name] for name, own in modules.items() if HALVES.keys() <= own.keys()}
    r, rank_pattern = _most_and_others(ranks)
    alpha, alpha_pattern = _most_and_others(scaled)
    kinds = "+".join(sorted({algorithm.kind for algorithm in algorithms.values()}))
    return LycorisConfig(kinds, r, alpha, rank_pattern, alpha_pattern, list(modules))


def lora_config(
    state: Mapping[str, Tensor], alphas: Mapping[str, float], stored: LoraConfig | None
) -> LoraConfig:
    """The configuration of LoRA tensors, with whole names: their own ranks, and alpha by module.

    Args:
        state: the tensors under PEFT's names.
        alphas: alpha of some modules; the others' are those of ``stored``.
        stored: a configuration to complete; ``None``: alpha is the rank where ``alphas`` lacks it.
    """
    config = LoraConfig() if stored is None else copy(stored)
    ranks = {name: len(state[f"{name}.lora_A.weight"]) for name in modules_of(state)}
    by_module = {
        name: alphas.get(name, rank if stored is None else _alpha(stored, name))
        for name, rank in ranks.items()
    }
    config.r, config.rank_pattern = _most_and_others(ranks)
    config.lora_alpha, config.alpha_pattern = _most_and_others(by_module)
    config.use_dora = any(name.endswith("lora_magnitude_vector") for name in state)
    config.target_modules = list(ranks)
    return config


def scaling(config: LoraConfig, state: Mapping[str, Tensor], module: str) -> float:
    """What PEFT multiplies a module's B A by."""
    rank = len(state[f"{module}.lora_A.weight"])
    return _alpha(config, module) / (rank**0.5 if config.use_rslora else rank)


def kind_of(config: PeftConfig | LycorisConfig) -> str:
    """The kind of an adapter by its configuration: a row of ``weights.kinds.KINDS``."""
    if isinstance(config, LycorisConfig):
        return config.kind
    if not isinstance(config, LoraConfig):
        return str(config.peft_type.value).lower()
    return "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"


def rank_of(config: PeftConfig | LycorisConfig, module: str) -> int:
    """A module's rank (PEFT's OFT: the number of blocks; 0: its algorithm has none)."""
    own = vars(config).get("rank_pattern", {})  # OFT has none
    return int(own.get(get_pattern_key(own, module), config.r))


def alpha_of(config: PeftConfig | LycorisConfig, module: str) -> float | None:
    """A module's alpha; ``None``: its kind has none."""
    if isinstance(config, LoraConfig):
        return _alpha(config, module)
    own = vars(config).get("alpha_pattern", {})  # OFT has neither
    return own.get(get_pattern_key(own, module), vars(config).get("alpha"))


def _alpha(config: LoraConfig, module: str) -> float:
    key = get_pattern_key(config.alpha_pattern, module)
    return config.alpha_pattern.get(key, config.lora_alpha)


def _most_and_others(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """The most common value, and the names that have another."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {name: value for name, value in values.items() if value != most}
