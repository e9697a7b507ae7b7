"""Renaming the keys of any tool's adapter files to PEFT's or LyCORIS' names, skipping none."""

import re
from collections import Counter
from collections.abc import Mapping
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
"""The prefixes of a module's name; files of ``save_attn_procs`` have none."""

RENAMED = {
    re.compile(r"\._orig_mod(?=\.)"): "",  # a compiled block
    re.compile(r"\.processor(?=\.)"): "",
    # the adapter's name, in a UNet's own state_dict()
    re.compile(
        r"\.(lora_[AB]|lora_magnitude_vector|(?:hada|lokr|oft)_\w+)\.(?!weight$|bias$)[^.]+(?=\.|$)"
    ): r".\1",
    # convert_state_dict_to_diffusers, diffusers < 0.20, diffusers 0.20, kohya and LyCORIS
    re.compile(r"(\.lora\.|_lora\.|\.lora_linear_layer\.|\.lora_)down\.weight$"): ".lora_A.weight",
    re.compile(r"(\.lora\.|_lora\.|\.lora_linear_layer\.|\.lora_)up\.weight$"): ".lora_B.weight",
    re.compile(r"\.lora_magnitude_vector\.weight$"): ".lora_magnitude_vector",  # PEFT's parameter
}
"""Other tools' parts of names, and PEFT's for each, in the order of replacement."""

TENSOR = re.compile(
    r"(.+?)\.(lora_[AB]\.(?:weight|bias)|lora_magnitude_vector"  # PEFT
    r"|(?:hada|lokr|oft)_\w+(?:\.weight)?"  # PEFT, LyCORIS
    r"|alpha|lora_mid\.weight|dora_scale|rescale|[ab][12]\.weight|diff|weight|on_input"  # LyCORIS
    r"|ia3_scale)"  # LyCORIS' weight and on_input in one, see adapters.weights.lycoris.simplify
)
"""A module's name, and PEFT's or LyCORIS' name for one of its tensors."""

FOREIGN = {
    r"(base_model\.model\.)?(text_encoder|te\d?\.|lora_te)": "adapt a text encoder: save the"
    " UNet's adapter alone",
    r"(lora_)?transformer": "adapt a transformer, but IF has none: load it with its own model",
    r"(lora_unet_|\w+\.)*(input|middle|output)_blocks?": "have the names of the original Stable"
    " Diffusion, but IF's UNets have diffusers' names: load it with its own model",
    r".*\.[wb]_norm$": "change normalisation layers, but only Linear and Conv2d layers can be"
    " adapted here: train without train_norm",
    r".*\.diff_b$": "change biases, but only weights can be adapted here: train with an"
    " algorithm other than full",
    r".*\.([pq]_layer\.weight|lambda_layer)$": "are of T-LoRA, whose rank changes"
    " with the timestep, so that it cannot be merged: train another algorithm",
    r".*(lora|hada|lokr|oft|alpha|dora|vera|ia3|boft|hra)": "belong to no module, or no kind of"
    " adapter, of an IF UNet: load it with its own model",
    r".*\.(weight|bias)$": "are weights of a model itself: make an adapter of a whole model with"
    " `python -m adapters.extract`",
}
"""Patterns of unusable keys, with what such keys do and the remedy; the first match counts."""

_UNDERSCORED = (
    *ROOTS,
    *("to_q", "to_k", "to_v", "to_out", "add_k_proj", "add_v_proj", "q_proj", "k_proj", "v_proj"),
    *("conv_shortcut", "time_emb_proj", "linear_1", "linear_2"),
)
_PART = re.compile(rf"(?:{'|'.join(_UNDERSCORED)})(?=_|$)|[^_]+")


def rename_tensors(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Rename tensors from the keys of a file to PEFT's names, or to LyCORIS' if PEFT has none.

    Raises:
        UserError: if keys are unknown or spelled twice, listing them and why each is unusable.
    """
    names = {key: peft_name(key) for key in tensors}
    count = Counter(names.values())
    problems: dict[str, list[str]] = {}
    for key, name in names.items():
        module, part = split_name(name) if name else ("", "")
        # an IA3 vector is called weight, like the weights of models; only IA3 has an on_input
        if name is None or (part == "weight" and f"{module}.on_input" not in count):
            known = (problem for pattern, problem in FOREIGN.items() if re.match(pattern, key))
            problem = next(known, "belong to no known kind of adapter: remove them")
        elif count[name] > 1:
            problem = "are two spellings, or two adapters, of one tensor: keep one of them"
        else:
            continue
        problems.setdefault(problem, []).append(key)
    if problems or not tensors:
        found = [f"{len(keys)} {problem} ({listed(keys)})" for problem, keys in problems.items()]
        has = f"of its {len(tensors)} keys {'; '.join(found)}" if found else "it is empty"
        raise UserError(
            f"{file} should hold an adapter of one IF UNet and nothing else, but {has}."
        )
    return {name: tensors[key] for key, name in names.items() if name is not None}


def peft_name(key: str) -> str | None:
    """Return PEFT's name for a key, without prefix; ``None``: no key of an IF UNet's adapter."""
    name = key[PREFIX.match(key).end() :]  # type: ignore[union-attr]  # PREFIX matches anything
    for pattern, ours in RENAMED.items():
        name = pattern.sub(ours, name)
    match = TENSOR.fullmatch(name)
    if match is None:
        return None
    module, part = match.groups()
    if "." not in module:
        module = ".".join(_PART.findall(module))
    if module.endswith(".to_out"):
        module += ".0"  # attention processors named the projection without its index in a list
    return f"{module}.{part}" if module.partition(".")[0] in ROOTS else None


def split_name(name: str) -> tuple[str, str]:
    """Split a tensor's name, as :func:`peft_name` returns it, into module and rest."""
    match = TENSOR.fullmatch(name)
    assert match is not None
    return match[1], match[2]


def by_name(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of all modules by their full names."""
    return {f"{name}.{part}": t for name, own in modules.items() for part, t in own.items()}


def by_module(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by module, under their names without the module's."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, part = split_name(name)
        modules.setdefault(module, {})[part] = tensor
    return modules
