"""Reading adapters of other tools: every key style becomes PEFT's names, no key is skipped."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.errors import UserError
from adapters.info import HEADER_KEY, PEFT_WEIGHTS, parse_info, weights_file
from adapters.kinds import KINDS, AdapterSpec
from adapters.names import ROOTS, listed
from adapters.whole import PEFT_TYPES, check_settings, check_values, check_whole

logger = logging.getLogger(__name__)

PREFIXES = (
    "base_model.model.",  # PEFT
    "unet.",  # diffusers
    "lora_unet_",  # kohya
    "diffusion_model.",  # SimpleTuner, for ComfyUI
)
"""What precedes a module's name; nothing in files of ``save_attn_procs``."""

ENDINGS = {
    ".lora.down.weight": ".lora_A.weight",  # convert_state_dict_to_diffusers
    ".lora.up.weight": ".lora_B.weight",
    "_lora.down.weight": ".lora_A.weight",  # attention processors of diffusers < 0.20
    "_lora.up.weight": ".lora_B.weight",
    ".lora_linear_layer.down.weight": ".lora_A.weight",  # diffusers 0.20
    ".lora_linear_layer.up.weight": ".lora_B.weight",
    ".lora_down.weight": ".lora_A.weight",  # kohya
    ".lora_up.weight": ".lora_B.weight",
    ".lora_magnitude_vector.weight": ".lora_magnitude_vector",  # PEFT's parameter, PEFT's file
}
"""How others end the names that PEFT ends like this."""

TENSOR = re.compile(
    r"(.+)\.(lora_[AB]\.(?:weight|bias)|lora_magnitude_vector|alpha"
    r"|(?:hada|lokr|oft)_\w+(?:\.weight)?)"
)
"""A module's name and what PEFT (``alpha``: kohya) calls one of its tensors."""

_UNDERSCORED = (
    *ROOTS,
    *("to_q", "to_k", "to_v", "to_out", "add_k_proj", "add_v_proj", "q_proj", "k_proj", "v_proj"),
    *("conv_shortcut", "time_emb_proj", "linear_1", "linear_2"),
)
_PART = re.compile(rf"(?:{'|'.join(_UNDERSCORED)})(?=_|$)|[^_]+")


def read_adapter(path: Path) -> tuple[PeftConfig, dict[str, Tensor], dict[str, str]]:
    """Read an adapter from a safetensors file, or a folder that holds one.

    Rank and alpha come from the tensors, ``adapter_config.json`` (beside PEFT's file), the header's
    ``lora_adapter_metadata`` or ``if_adapter``, or ``.alpha`` tensors; where none says, alpha is
    the rank, as diffusers takes it; a warning says so where PEFT's file lacks its configuration.

    Returns:
        PEFT's configuration with whole module names, the tensors under PEFT's names without
        prefix (``mid_block.attentions.0.to_q.lora_A.weight``), and the file's header.

    Raises:
        UserError: where the file cannot be read, has keys that are unknown or lack their pair,
            values that are no finite numbers, or not all that its configuration speaks of.
    """
    file = weights_file(path)
    if file is None:
        raise UserError(
            f"{path} is no adapter (a .safetensors file, or a folder with {PEFT_WEIGHTS},"
            " pytorch_lora_weights.safetensors or a single .safetensors file in it); correct the"
            " path, and convert pickled files (.bin, .pt, .ckpt) first."
        )
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); fetch or export it again.") from error
    state = named(tensors, file)
    check_values(tensors, file)
    alphas = {
        name.removesuffix(".alpha"): float(state.pop(name))
        for name in list(state)
        if name.endswith(".alpha")
    }
    config = stored_config(file, header)
    check_whole(config, parts_of(state), file)
    if file.name == PEFT_WEIGHTS and not (config or alphas or HEADER_KEY in header):
        logger.warning("%s has no %s beside it: alpha is taken as its rank.", file, CONFIG_NAME)
    if config is None or isinstance(config, LoraConfig):
        return lora_config(state, alphas, config), state, header
    config.target_modules = modules_of(state)
    return config, state, header


def named(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Tensors of any key style under PEFT's names.

    Raises:
        UserError: listing the keys that are unknown, spelled twice, or lack their pair.
    """
    names = {key: peft_name(key) for key in tensors}
    count = Counter(names.values())
    state = {name: tensors[key] for key, name in names.items() if name is not None}
    problems = {
        "unknown": [key for key, name in names.items() if name is None],
        "given twice": [key for key, name in names.items() if name and count[name] > 1],
        "without their pair": [
            key for key, name in names.items() if name and not _paired(name, state)
        ],
    }
    if any(problems.values()) or not state:
        found = "; ".join(f"{word}: {listed(keys)}" for word, keys in problems.items() if keys)
        raise UserError(
            f"{file} should hold an adapter of one IF UNet and nothing else, but of its"
            f" {len(tensors)} keys some are not usable ({found or 'it has none'}); save the UNet's"
            " adapter alone, with whole pairs of tensors."
        )
    return state


def peft_name(key: str) -> str | None:
    """A tensor's name as PEFT has it, without prefix; ``None``: no key of an IF UNet's adapter."""
    name = next((key.removeprefix(p) for p in PREFIXES if key.startswith(p)), key)
    name = name.replace(".processor.", ".")
    for theirs, ours in ENDINGS.items():
        if name.endswith(theirs):
            name = name.removesuffix(theirs) + ours
            break
    match = TENSOR.fullmatch(name)
    if match is None:
        return None
    module, tensor = match.groups()
    if "." not in module:
        module = ".".join(_PART.findall(module))
    if module.endswith(".to_out"):
        module += ".0"  # attention processors knew the projection without its list
    return f"{module}.{tensor}" if module.partition(".")[0] in ROOTS else None


def module_of(name: str) -> str:
    """The module that a tensor, by PEFT's name, adapts."""
    match = TENSOR.fullmatch(name)
    assert match is not None
    return match[1]


def modules_of(state: Iterable[str]) -> list[str]:
    """The modules that tensors, by PEFT's names, adapt."""
    return list(parts_of(state))


def parts_of(state: Iterable[str]) -> dict[str, list[str]]:
    """What the tensors of each module, by PEFT's names, are called without the module's name."""
    parts: dict[str, list[str]] = {}
    for name in state:
        module = module_of(name)
        parts.setdefault(module, []).append(name.removeprefix(f"{module}."))
    return parts


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
            config = LoraConfig(**unet_settings(json.loads(header[LORA_ADAPTER_METADATA_KEY])))
        elif HEADER_KEY in header:
            return signed_config(parse_info(header, file).spec)
        else:
            return None
        check_settings(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        where = beside if own else f"{LORA_ADAPTER_METADATA_KEY} of {file}"
        raise UserError(
            f"{where} is no PEFT configuration of a UNet's adapter ({error}); mend it or export"
            " again."
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
    if found not in PEFT_TYPES:
        raise ValueError(f"its peft_type should be one of {', '.join(PEFT_TYPES)}, not {found!r}")


def unet_settings(settings: Any) -> dict[str, Any]:
    """The UNet's settings in the JSON of a header; a ValueError where it has another form."""
    if not isinstance(settings, dict):
        raise ValueError(f"it should be settings by name, not {settings!r}")
    own = {key: value for key, value in settings.items() if key.startswith("unet.")}
    return {key.removeprefix("unet."): value for key, value in own.items()}


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


def kind_of(config: PeftConfig) -> str:
    """The kind of an adapter by its configuration, as :data:`adapters.kinds.KINDS` has it."""
    if not isinstance(config, LoraConfig):
        return str(config.peft_type.value).lower()
    return "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"


def rank_of(config: PeftConfig, module: str) -> int:
    """A module's rank (OFT: the number of blocks)."""
    own = vars(config).get("rank_pattern", {})  # OFT has none
    return int(own.get(get_pattern_key(own, module), config.r))


def alpha_of(config: PeftConfig, module: str) -> float | None:
    """A module's alpha; ``None``: its kind has none."""
    if isinstance(config, LoraConfig):
        return _alpha(config, module)
    own = vars(config).get("alpha_pattern", {})  # OFT has neither
    return own.get(get_pattern_key(own, module), vars(config).get("alpha"))


def _alpha(config: LoraConfig, module: str) -> float:
    key = get_pattern_key(config.alpha_pattern, module)
    return config.alpha_pattern.get(key, config.lora_alpha)


def _most_and_others(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and the names that have another."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {name: value for name, value in values.items() if value != most}


def _paired(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a LoRA tensor's module has both matrices, of one rank (of other kinds: yes)."""
    module = module_of(name)
    if not name.removeprefix(f"{module}.").startswith(("lora_", "alpha")):
        return True
    a, b = (state.get(f"{module}.lora_{side}.weight") for side in "AB")
    if a is None or b is None or a.ndim < 2 or b.ndim < 2:
        return False
    return a.shape[0] == b.shape[1]
