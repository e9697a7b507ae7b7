"""Checks that an adapter's tensors and settings are usable and complete."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from adapters.errors import UserError, listed
from adapters.files.places import PEFT_CONFIG
from adapters.files.settings import PEFT_ERRORS
from adapters.weights.kinds import ROOTS
from adapters.weights.lycoris import Tensors, check_shapes, missing_tensors, simplify

FLOATS = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
"""The types of values that adapters are read in, and their names in messages."""

ALPHAS = {
    *FLOATS,
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
"""The types of values that alphas and switches are read in."""


@contextmanager
def explain_peft_errors(place: Path) -> Iterator[None]:
    """Turn PEFT's errors over an adapter's settings into a UserError."""
    try:
        yield
    except PEFT_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{place} has settings that PEFT cannot apply here ({type(error).__name__}: {reason});"
            " correct its configuration, or load the model that it was trained on."
        ) from error


def check_values(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Check that tensors, by the keys of a file, hold usable numbers.

    Raises:
        UserError: if a tensor is empty, of a type other than :data:`FLOATS` (alphas may be
            integers), not finite in float32, or an alpha of several values.
    """
    alphas = {key for key in tensors if key.endswith((".alpha", ".on_input"))}
    factors = {key: tensor for key, tensor in tensors.items() if key not in alphas}
    other = {
        key: tensor.dtype
        for key, tensor in tensors.items()
        if tensor.dtype not in (ALPHAS if key in alphas else FLOATS)
    }
    if other:
        found = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in other.values()}))
        raise UserError(
            f"{file} has tensors of the type {found} ({listed(other, 4)}), but adapters must be in"
            f" one of {', '.join(FLOATS.values())}; convert it to fp16, bf16 or fp32."
        )
    problems = {
        "that are empty (of rank 0)": [key for key, t in factors.items() if not t.numel()],
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


def check_modules(
    modules: Mapping[str, Tensors], alphas: Iterable[str], file: Path
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each module, checked and simplified (``lycoris.simplify``).

    Raises:
        UserError: if a module lacks tensors that its other tensors or its alpha need, or has some
            that cannot be multiplied.
    """
    whole: dict[str, dict[str, Tensor]] = {}
    lacking, misfits = [f"all but {name}.alpha" for name in alphas if name not in modules], []
    for name, tensors in modules.items():
        own = tensors
        try:
            own = whole[name] = simplify(tensors)
            if missing := missing_tensors(own):
                has = listed([part for part in own if part not in missing], 4)
                gone = " and ".join(f"{name}.{part}" for part in missing)
                lacking.append(f"{gone} to go with {has}")
            else:
                check_shapes(own)
        except RuntimeError:
            shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in own.items())
            misfits.append(f"{name}: {shapes}")
    if lacking:
        raise UserError(
            f"{file} is incomplete: it lacks tensors of {len(lacking)} modules ({listed(lacking)});"
            " fetch or export it again."
        )
    if misfits:
        raise UserError(
            f"{file} has tensors of one module that cannot be multiplied, as their ranks or"
            f" dimensions differ ({listed(misfits, 4)}); fetch or export it again."
        )
    return whole


def full_targets(config: PeftConfig) -> Iterable[str]:
    """Return the names, or endings, of a configuration's modules; none if it has a pattern."""
    targets = config.target_modules
    return () if targets is None or isinstance(targets, str) else targets


def check_whole(config: PeftConfig | None, modules: Mapping[str, Tensors], file: Path) -> None:
    """Check that an adapter has the tensors, and the modules, that its configuration names.

    Only full names show that a module is missing: endings and regular expressions may match
    modules that the UNet does not have. LoRAs need no configuration.

    Raises:
        UserError: if tensors are missing or of another kind, listing them.
    """
    kind = "LORA" if config is None else str(config.peft_type.value)
    mark = PEFT_TYPE_TO_PREFIX_MAPPING[kind]
    others = [
        f"{name}.{part}"
        for name, own in modules.items()
        for part in own
        if not part.startswith(mark)
    ]
    if others:
        says = f"a configuration of {kind}" if config else f"no {PEFT_CONFIG} next to it"
        alpha = "" if config else " than LoRA, without alphas"
        raise UserError(
            f"{file} has {says}, but tensors of another kind of adapter{alpha}"
            f" ({listed(others, 4)}); put the {PEFT_CONFIG} that it was saved with next to it."
        )
    full = () if config is None else full_targets(config)
    with explain_peft_errors(file):
        missing = [
            name
            for name in sorted(full)
            if name.partition(".")[0] in ROOTS
            and check_target_module_exists(config, name)  # exclude_modules may name it
            and name not in modules
        ]
    if missing:
        raise UserError(
            f"{file} has no tensors for {len(missing)} of the modules that its configuration names"
            f" ({listed(missing)}); fetch or export it again."
        )
    lacking = [name for name, own in modules.items() if "lora_magnitude_vector" not in own]
    dora = isinstance(config, LoraConfig) and config.use_dora
    if lacking and (dora or len(lacking) < len(modules)):
        raise UserError(
            f"{file} is a DoRA, but has no lora_magnitude_vector for {len(lacking)} modules"
            f" ({listed(lacking)}); fetch or export it again."
        )
