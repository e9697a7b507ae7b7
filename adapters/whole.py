"""Whether what was read of an adapter can be used, and is all of it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from adapters.errors import UserError
from adapters.kinds import KINDS
from adapters.names import ROOTS, listed
from adapters.scales import is_factor

DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
"""The types of values that adapters are read in, and what people call them."""

PEFT_TYPES = tuple(dict.fromkeys(str(kind.config().peft_type.value) for kind in KINDS.values()))
"""What PEFT calls the kinds of adapter that a UNet takes here."""

PREFIXES = {kind.value: mark for kind, mark in PEFT_TYPE_TO_PREFIX_MAPPING.items()}
"""What the names of a kind's tensors begin with, by PEFT's name of the kind."""

RANKS, FACTORS = ("r", "rank_pattern"), ("lora_alpha", "alpha", "alpha_pattern")
"""The settings that are whole numbers from 1, and numbers: one, or one by module."""


PEFT_ERRORS = (
    *(ArithmeticError, AttributeError, ImportError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
"""What PEFT raises over settings that it cannot follow."""


@contextmanager
def following_settings(place: Path) -> Iterator[None]:
    """Turn what PEFT raises over an adapter's settings into a UserError."""
    try:
        yield
    except PEFT_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{place} has settings that PEFT cannot follow here ({type(error).__name__}: {reason});"
            " mend its configuration, or load the model that it was trained on."
        ) from error


def check_values(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Check that an adapter's tensors hold numbers that can be computed with.

    Args:
        tensors: by the keys of the file; alphas may be integers.
        file: for messages.

    Raises:
        UserError: where one is empty, of a type other than :data:`DTYPES`, not finite in float32,
            or an alpha of several values.
    """
    alphas = {key for key in tensors if key.endswith(".alpha")}
    factors = {key: tensor for key, tensor in tensors.items() if key not in alphas}
    other = {key: tensor.dtype for key, tensor in factors.items() if tensor.dtype not in DTYPES}
    if other:
        found = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in other.values()}))
        raise UserError(
            f"{file} has tensors of the type {found} ({listed(other, 4)}), and adapters are read in"
            f" {', '.join(DTYPES.values())}; convert it to fp16, bf16 or fp32."
        )
    problems = {
        "without any value, of rank 0": [key for key, t in factors.items() if not t.numel()],
        "an alpha that is not one number": [key for key in alphas if tensors[key].numel() != 1],
        "with values that are NaN or infinite": [
            key for key, tensor in tensors.items() if not tensor.float().isfinite().all()
        ],
    }
    for problem, keys in problems.items():
        if keys:
            raise UserError(
                f"{file} should hold finite numbers, but has tensors {problem}: {listed(keys, 4)};"
                " train or export it again."
            )


def check_settings(config: PeftConfig) -> None:
    """Check the settings of a configuration that are computed with.

    Raises:
        ValueError: naming the first that is not of its type or range.
    """
    settings = vars(config)
    for name in settings.keys() & {*RANKS, *FACTORS}:
        by_module = settings[name] if name.endswith("_pattern") else {name: settings[name]}
        if not isinstance(by_module, Mapping):
            raise ValueError(f"its {name} is {by_module!r}")
        for key, value in by_module.items():
            if not (_is_rank(value, config) if name in RANKS else is_factor(value)):
                raise ValueError(f"its {name} is {value!r}" + f" for {key}" * (key != name))
    targets = settings["target_modules"]
    listing = targets if isinstance(targets, list | set) else ()
    if not isinstance(targets, str | list | set | None) or not all(
        isinstance(target, str) for target in listing
    ):
        raise ValueError(f"its target_modules are {targets!r}")


def _is_rank(value: object, config: PeftConfig) -> bool:
    least = 0 if vars(config).get("oft_block_size") else 1  # OFT has the one or the other
    return isinstance(value, int) and value >= least


def check_whole(
    config: PeftConfig | None, modules: Mapping[str, Iterable[str]], file: Path
) -> None:
    """Check that an adapter has the tensors, and the modules, that its configuration speaks of.

    Modules are known to be missing where the configuration has their full names; endings and
    regular expressions may mean modules that the UNet does not have.

    Args:
        config: the configuration as it was stored; ``None``: there was none, which LoRAs need not.
        modules: the names of tensors, without the module's, by module.
        file: for messages.

    Raises:
        UserError: listing what is missing, or of another kind.
    """
    kind = "LORA" if config is None else str(config.peft_type.value)
    others = [
        f"{module}.{tensor}"
        for module, tensors in modules.items()
        for tensor in tensors
        if not tensor.startswith(PREFIXES[kind])
    ]
    if others:
        says = f"a configuration of {kind}" if config else "no adapter_config.json beside it"
        raise UserError(
            f"{file} has {says}, but tensors of another kind of adapter ({listed(others, 4)}); put"
            " the adapter_config.json beside it that it was saved with."
        )
    with following_settings(file):
        missing = [name for name in full_names(config) if name not in modules]
    if missing:
        raise UserError(
            f"{file} should adapt {len(missing)} modules that its configuration names and it has"
            f" no tensors of ({listed(missing)}); fetch or export it again."
        )
    lacking = [name for name, own in modules.items() if "lora_magnitude_vector" not in own]
    dora = isinstance(config, LoraConfig) and config.use_dora
    if lacking and (dora or len(lacking) < len(modules)):
        raise UserError(
            f"{file} is a DoRA, but has no lora_magnitude_vector of {len(lacking)} modules"
            f" ({listed(lacking)}); fetch or export it again."
        )


def full_names(config: PeftConfig | None) -> list[str]:
    """The modules that a configuration adapts by their full names."""
    targets = None if config is None else vars(config)["target_modules"]
    if config is None or targets is None or isinstance(targets, str):
        return []
    full = (name for name in targets if name.partition(".")[0] in ROOTS)
    return sorted(name for name in full if check_target_module_exists(config, name))
