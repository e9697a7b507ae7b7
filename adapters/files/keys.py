"""Spellings of an adapter's keys: every tool's become PEFT's or LyCORIS' names, none is skipped."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from adapters.errors import UserError, listed
from adapters.weights.kinds import ROOTS

PREFIX = re.compile(
    r"(?:base_model\.model\."  # PEFT
    r"|unet\."  # diffusers
    r"|lora_unet_"  # kohya
    r"|lycoris_"  # LyCORIS, SimpleTuner
    r"|diffusion_model\."  # SimpleTuner, for ComfyUI
    r"|module[._]|_orig_mod[._])*"  # a UNet wrapped by DistributedDataParallel, torch.compile
)
"""What precedes a module's name; nothing in files of ``save_attn_procs``."""

WITHIN = {
    re.compile(r"\._orig_mod(?=\.)"): "",  # a compiled block
    re.compile(r"\.processor(?=\.)"): "",
    # the adapter's name, in a UNet's own state_dict()
    re.compile(
        r"\.(lora_[AB]|lora_magnitude_vector|(?:hada|lokr|oft)_\w+)\.(?!weight$|bias$)[^.]+(?=\.|$)"
    ): r".\1",
}
"""What stands within a name, and what of it stays."""

ENDINGS = {
    ".lora.down.weight": ".lora_A.weight",  # convert_state_dict_to_diffusers
    ".lora.up.weight": ".lora_B.weight",
    "_lora.down.weight": ".lora_A.weight",  # attention processors of diffusers < 0.20
    "_lora.up.weight": ".lora_B.weight",
    ".lora_linear_layer.down.weight": ".lora_A.weight",  # diffusers 0.20
    ".lora_linear_layer.up.weight": ".lora_B.weight",
    ".lora_down.weight": ".lora_A.weight",  # kohya, LyCORIS
    ".lora_up.weight": ".lora_B.weight",
    ".lora_magnitude_vector.weight": ".lora_magnitude_vector",  # PEFT's parameter, PEFT's file
}
"""How others end the names that PEFT ends like this."""

TENSOR = re.compile(
    r"(.+?)\.(lora_[AB]\.(?:weight|bias)|lora_magnitude_vector"  # PEFT
    r"|(?:hada|lokr|oft)_\w+(?:\.weight)?"  # PEFT, LyCORIS
    r"|alpha|lora_mid\.weight|dora_scale|rescale|[ab][12]\.weight|diff|weight|on_input"  # LyCORIS
    r"|ia3_scale)"  # LyCORIS' two, see adapters.weights.lycoris.simplify
)
"""A module's name and what PEFT or LyCORIS calls one of its tensors."""

FOREIGN = {
    r"(base_model\.model\.)?(text_encoder|te\d?\.|lora_te)": "adapt a text encoder: save the"
    " UNet's adapter alone",
    r"(lora_)?transformer": "adapt a transformer, and IF has none: load it with its own model",
    r"(lora_unet_|\w+\.)*(input|middle|output)_blocks?": "have the names of the original Stable"
    " Diffusion, and IF's UNets have diffusers' names: load it with its own model",
    r".*\.[wb]_norm$": "change normalisation layers, and only Linear and Conv2d layers can be"
    " adapted here: train without train_norm",
    r".*\.diff_b$": "change biases, and only weights can be adapted here: train with another"
    " algorithm than full",
    r".*\.([pq]_layer\.weight|lambda_layer)$": "are of T-LoRA, whose rank changes"
    " with the timestep, so that it cannot be merged: train another algorithm",
    r".*(lora|hada|lokr|oft|alpha|dora|vera|ia3|boft|hra)": "are of no module and no kind of"
    " adapter that an IF UNet takes: load it with its own model",
    r".*\.(weight|bias)$": "are weights of a model itself: make an adapter of a whole model with"
    " `python -m adapters.extract`",
}
"""What keys that cannot be used look like, what they do and what to do; the first match counts."""

TWICE = "are two spellings, or two adapters, of one tensor: keep one of them"
"""What is wrong with two keys of one name."""

_UNDERSCORED = (
    *ROOTS,
    *("to_q", "to_k", "to_v", "to_out", "add_k_proj", "add_v_proj", "q_proj", "k_proj", "v_proj"),
    *("conv_shortcut", "time_emb_proj", "linear_1", "linear_2"),
)
_PART = re.compile(rf"(?:{'|'.join(_UNDERSCORED)})(?=_|$)|[^_]+")


def rename_tensors(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return tensors of any key style under PEFT's names, or LyCORIS' where PEFT has none.

    Args:
        tensors: by the keys of the file.
        file: for messages.

    Raises:
        UserError: listing the keys that are unknown or spelled twice, and why each is unusable.
    """
    names = {key: peft_name(key) for key in tensors}
    count = Counter(names.values())
    problems: dict[str, list[str]] = {}
    for key, name in names.items():
        if name is None or (
            tensor_of(name) == "weight" and f"{module_of(name)}.on_input" not in count
        ):
            problems.setdefault(describe_foreign(key), []).append(key)
        elif count[name] > 1:
            problems.setdefault(TWICE, []).append(key)
    if problems or not tensors:
        found = [f"{len(keys)} {what} ({listed(keys)})" for what, keys in problems.items()]
        raise UserError(
            f"{file} should hold an adapter of one IF UNet and nothing else, but of its"
            f" {len(tensors)} keys {'; '.join(found) or 'none is there: name another file'}."
        )
    return {name: tensors[key] for key, name in names.items() if name is not None}


def describe_foreign(key: str) -> str:
    """What a key that cannot be used does, and what to do about it."""
    found = (what for pattern, what in FOREIGN.items() if re.match(pattern, key))
    return next(found, "are of no kind of adapter that is known here: remove them")


def peft_name(key: str) -> str | None:
    """A tensor's name as PEFT has it, without prefix; ``None``: no key of an IF UNet's adapter."""
    name = key[PREFIX.match(key).end() :]  # type: ignore[union-attr]  # it matches anything
    for pattern, rest in WITHIN.items():
        name = pattern.sub(rest, name)
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
    return _matched(name)[1]


def tensor_of(name: str) -> str:
    """A tensor's name, by PEFT's, without its module's."""
    return _matched(name)[2]


def modules_of(state: Iterable[str]) -> list[str]:
    """The modules that tensors, by PEFT's names, adapt."""
    return list(parts_of(state))


def parts_of(state: Iterable[str]) -> dict[str, list[str]]:
    """The names of each module's tensors, without the module's own."""
    parts: dict[str, list[str]] = {}
    for name in state:
        parts.setdefault(module_of(name), []).append(tensor_of(name))
    return parts


def tensors_of(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module by their names without the module's own."""
    return {
        module: {part: state[f"{module}.{part}"] for part in parts}
        for module, parts in parts_of(state).items()
    }


def _matched(name: str) -> re.Match[str]:
    match = TENSOR.fullmatch(name)
    assert match is not None
    return match
