"""Whether what was read of an adapter can be used, and is all of it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor

from adapters.arguments import is_factor
from adapters.errors import UserError, listed
from adapters.weights.kinds import KINDS, ROOTS
from adapters.weights.lycoris import HALVES, Tensors, algorithm_of, missing_tensors, simplify

DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
"""The types of values that adapters are read in, and what people call them."""

PEFT_TYPES = {str(kind.config().peft_type.value): kind.config for kind in KINDS.values()}
"""The configurations of the kinds of adapter that a UNet takes here, by PEFT's name of them."""

PREFIXES = {kind.value: mark for kind, mark in PEFT_TYPE_TO_PREFIX_MAPPING.items()}
"""What the names of a kind's tensors begin with, by PEFT's name of the kind."""

RANKS, FACTORS = ("r", "rank_pattern"), ("lora_alpha", "alpha", "alpha_pattern")
"""The settings that are whole numbers from 1, and numbers: one, or one by module."""

EXPRESSIONS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
"""The settings that are regular expressions where they are one string, or by such."""

LARGEST_RANK = 2**31 - 1
"""The largest rank or number of blocks that a configuration may state."""

PEFT_ERRORS = (
    *(ArithmeticError, AttributeError, ImportError, LookupError),
    *(RuntimeError, TypeError, ValueError, re.error),
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
            " correct its configuration, or load the model that it was trained on."
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
    alphas = {key for key in tensors if key.endswith((".alpha", ".on_input"))}
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
        "that should be one number each": [key for key in alphas if tensors[key].numel() != 1],
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
    for name in EXPRESSIONS:
        value = settings.get(name)
        patterns = [value] if isinstance(value, str) else value if isinstance(value, dict) else ()
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"its {name} has {pattern!r}, which is no regular expression: {error}"
                ) from error


def _is_rank(value: object, config: PeftConfig) -> bool:
    least = 0 if vars(config).get("oft_block_size") else 1  # OFT has the one or the other
    return isinstance(value, int) and least <= value <= LARGEST_RANK


def whole_modules(
    modules: Mapping[str, Tensors], alphas: Iterable[str], file: Path
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each module, checked and simplified (``lycoris.simplify``).

    Args:
        modules: the tensors of each module.
        alphas: the modules that have an alpha.
        file: for messages.

    Raises:
        UserError: where a module lacks tensors that its others need, or has some that cannot be
            multiplied, naming them.
    """
    whole: dict[str, dict[str, Tensor]] = {}
    lacking, misfits = [f"{name}.alpha alone" for name in alphas if name not in modules], []
    for name, tensors in modules.items():
        try:
            whole[name] = own = simplify(tensors)
        except RuntimeError:
            misfits.append(_shapes(name, tensors))
            continue
        if missing := missing_tensors(own):
            has = listed([part for part in own if part not in missing], 4)
            lacking.append(f"{' and '.join(f'{name}.{part}' for part in missing)} beside {has}")
        elif not _multiply(own):
            misfits.append(_shapes(name, own))
    if lacking:
        raise UserError(
            f"{file} is not whole: it lacks tensors of {len(lacking)} modules ({listed(lacking)});"
            " fetch or export it again."
        )
    if misfits:
        raise UserError(
            f"{file} has tensors of one module that cannot be multiplied, as their ranks or"
            f" dimensions differ ({listed(misfits, 4)}); fetch or export it again."
        )
    return whole


def _multiply(tensors: Tensors) -> bool:
    """Whether a module's tensors are matrices, or more, and those of a LoRA have one rank."""
    algorithm = algorithm_of(tensors)
    needs = algorithm.needs if algorithm else ()
    matrices = [*needs, *(half for name in needs for half in HALVES.get(name, ())), "dora_scale"]
    if any(tensors[name].ndim < 2 for name in matrices if name in tensors):
        return False
    a, b = (tensors.get(f"lora_{side}.weight") for side in "AB")
    return a is None or b is None or len(a) == b.shape[1]


def _shapes(name: str, tensors: Tensors) -> str:
    found = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in tensors.items())
    return f"{name}: {found}"


def check_ranks(config: PeftConfig, modules: Mapping[str, Tensors], file: Path) -> None:
    """Check that a LoHa or LoKr has the ranks that its configuration states, as it scales by them.

    Raises:
        UserError: naming the first module whose tensors have another.
    """
    for name, tensors in modules.items():
        algorithm = algorithm_of(tensors)
        if algorithm is None or HALVES.keys() <= tensors.keys():
            continue  # PEFT's OFT, which scales by no rank; whole matrices, which may have any
        own, found = config.rank_pattern, algorithm.rank(tensors)
        stated = own.get(get_pattern_key(own, name), config.r)
        if stated != found:
            raise UserError(
                f"{file} has tensors of rank {found} for {name}, but its configuration states"
                f" {stated}; put the adapter_config.json beside it that it was saved with."
            )


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
        alpha = "" if config else " without an alpha each"
        raise UserError(
            f"{file} has {says}, but tensors of another kind of adapter{alpha}"
            f" ({listed(others, 4)}); put the adapter_config.json beside it that it was saved with."
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
