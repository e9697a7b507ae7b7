"""The PEFT configuration of an adapter: read from its file or header, and checked.

Such files come from others. Settings that would change more than the weights of single layers, or
that this version of PEFT does not know, are refused rather than passed over; patterns of module
names are matched here, within a time limit, and PEFT is only handed the names that they match.
"""

import json
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import regex
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from adapters.arguments import is_factor
from adapters.errors import UserError, listed, quote
from adapters.files.info import HEADER_KEY, parse_info
from adapters.files.places import PEFT_CONFIG, PEFT_WEIGHTS
from adapters.text_files import MIB, parse_object, read_text
from adapters.weights.kinds import KINDS

PEFT_TYPES = tuple(dict.fromkeys(kind.peft_type for kind in KINDS.values()))
"""PEFT's names for the kinds of adapter that a UNet takes here."""

PEFT_ERRORS = (
    *(ArithmeticError, AttributeError, ImportError, LookupError),
    *(RuntimeError, TypeError, ValueError, re.error),
)
"""The errors that PEFT raises over settings that it cannot follow."""

IN_FACTORS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"),
    *("init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "task_type"),
}
"""The settings of a ``LoraConfig`` that change a merged weight through its factors alone."""

APPLIED = {
    *IN_FACTORS,
    *("peft_type", "bias", "lora_bias", "fan_in_fan_out", "alpha", "init_weights"),
    *("rank_dropout", "module_dropout", "rank_dropout_scale", "decompose_both", "decompose_factor"),
    *("oft_block_size", "coft", "eps", "block_share"),
    *("use_cayley_neumann", "num_cayley_neumann_terms"),
}
"""The settings, of any kind, that are followed when an adapter is merged."""

PATTERNS = ("rank_pattern", "alpha_pattern")
"""The settings with patterns of module names as keys."""

IGNORED = {"runtime_config", "peft_version", "auto_mapping"}
"""The settings that say nothing about the weights."""

LARGEST_RANK = 2**31 - 1
"""The largest rank or number of blocks that a configuration may state."""

MOST_TERMS = 100
"""The most steps of the iterations that settings ask for; PEFT's own default is 5."""

MOST_MIB = 16
"""The size of a configuration; one that names every module of IF has some 50 KiB."""

LONGEST_PATTERN = 1000
"""The most letters of a pattern of module names."""

SECONDS = 3.0
"""The time that matching all patterns of a configuration may take."""


def read_config(file: Path, header: Mapping[str, str]) -> PeftConfig | None:
    """Read the configuration next to an adapter's file, or in its header.

    Returns:
        The configuration; ``None`` if it is missing, or is merely a LoRA with alpha = rank.

    Raises:
        UserError: if it is damaged, or has settings that cannot be followed.
    """
    beside = file.parent / PEFT_CONFIG
    sources: dict[str, tuple[bool, Callable[[], PeftConfig | None]]] = {
        str(beside): (
            file.name == PEFT_WEIGHTS and beside.exists(),
            lambda: _build(_read_object(beside)),
        ),
        f"{LORA_ADAPTER_METADATA_KEY} of {file}": (
            LORA_ADAPTER_METADATA_KEY in header,
            lambda: _header_config(header[LORA_ADAPTER_METADATA_KEY]),
        ),
        f"{HEADER_KEY} of {file}": (HEADER_KEY in header, lambda: _spec_config(header, file)),
    }
    for where, (is_there, read) in sources.items():
        if not is_there:
            continue
        try:
            config = read()
            if config is not None:
                check_settings(config)
            return config
        except PEFT_ERRORS as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{where} is not a PEFT configuration of a UNet's adapter ({reason}); correct it,"
                " or export again."
            ) from error
    return None


def _read_object(file: Path) -> dict[str, Any]:
    text = read_text(file, MOST_MIB * MIB)
    try:
        return parse_object(text)
    except ValueError as error:
        raise ValueError(f"it must be a JSON object ({error})") from error


def _spec_config(header: Mapping[str, str], file: Path) -> PeftConfig | None:
    spec = parse_info(header, file).spec
    is_plain = spec.kind == "lora" and spec.alpha is None
    return None if is_plain else KINDS[spec.kind].peft_config(spec)


def _header_config(metadata: str) -> PeftConfig | None:
    settings = _unet_settings(json.loads(metadata))
    return _build(settings) if settings else None


def _unet_settings(metadata: Any) -> dict[str, Any]:
    """Return the UNet's settings in the JSON of a header; empty: they are of another model.

    Pipelines write ``unet.r``, ``UNet2DConditionModel.save_lora_adapter`` writes ``r``.
    """
    if not isinstance(metadata, dict):
        raise ValueError(f"it should be a mapping of settings, not {quote(metadata)}")
    own = {key.removeprefix("unet."): v for key, v in metadata.items() if key.startswith("unet.")}
    own = own or {key: value for key, value in metadata.items() if "." not in key}
    return own and {"peft_type": "LORA"} | own


def _build(settings: Mapping[str, Any]) -> PeftConfig:
    """Build a configuration from JSON.

    What this version of PEFT does not know is left out if it is empty or off, as newer versions
    write all their settings, and is an error otherwise.
    """
    found = settings.get("peft_type")
    if found not in PEFT_TYPES:
        raise ValueError(
            f"its peft_type should be one of {', '.join(PEFT_TYPES)}, not {quote(found)}"
        )
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[found]
    names = {field.name for field in fields(kind)} - {"runtime_config"}
    for name in ("oft_block_size", "decompose_factor"):  # PEFT computes with them at once
        if not isinstance(settings.get(name, 0), int):
            raise ValueError(f"its {name} is {quote(settings[name])}")
    unknown = [key for key, value in settings.items() if key not in names | IGNORED and value]
    if unknown:
        raise ValueError(
            f"its {listed(unknown, 4)} are no settings of a {found} in this version of PEFT: update"
            " PEFT, or put its own configuration there"
        )
    known = {key: value for key, value in settings.items() if key in names}
    with warnings.catch_warnings(action="ignore"):  # of settings that have no effect
        return kind(**kind.check_kwargs(**known))


def check_settings(config: PeftConfig) -> None:
    """Raise a ValueError that names the first setting that cannot be followed."""
    settings = config.to_dict()
    usual = type(config)().to_dict()
    for name, value in settings.items():
        if name not in APPLIED | IGNORED and value and value != usual.get(name):
            raise ValueError(f"its {name} is {quote(value)}, which cannot be merged")
    _check_numbers(settings)
    _check_words(settings)
    _check_names(settings)


def _check_numbers(settings: Mapping[str, Any]) -> None:
    least = 0 if settings.get("oft_block_size") else 1  # OFT has either r or this

    def is_rank(value: object) -> bool:
        return isinstance(value, int) and least <= value <= LARGEST_RANK

    ranks, factors = ("r", "rank_pattern"), ("lora_alpha", "alpha", "alpha_pattern")
    for name in (*ranks, *factors):
        if name not in settings:
            continue
        by_module = settings[name] if name in PATTERNS else {name: settings[name]}
        if not isinstance(by_module, dict):
            raise ValueError(f"its {name} is {quote(by_module)}")
        for key, value in by_module.items():
            if not (is_rank(value) if name in ranks else is_factor(value)):
                raise ValueError(f"its {name} is {quote(value)}" + f" for {key}" * (key != name))
    terms = settings.get("num_cayley_neumann_terms", 1)
    if not isinstance(terms, int) or not 0 < terms <= MOST_TERMS:
        raise ValueError(f"its num_cayley_neumann_terms is {quote(terms)}, not 1 to {MOST_TERMS}")


def _check_words(settings: Mapping[str, Any]) -> None:
    """Check the settings that are one of several words, or true or false."""
    bias = settings.get("bias", "none")
    if bias not in ("none", "all", "lora_only", "oft_only"):
        raise ValueError(f"its bias is {quote(bias)}")
    start = settings.get("init_lora_weights", True)
    if not isinstance(start, bool | str):
        raise ValueError(f"its init_lora_weights is {quote(start)}")
    steps = str(start).rpartition("_niter_")[2]
    if steps != str(start) and not (steps.isdecimal() and int(steps[:9]) <= MOST_TERMS):
        raise ValueError(
            f"its init_lora_weights is {quote(start)}, of more than {MOST_TERMS} steps"
        )


def _check_names(settings: Mapping[str, Any]) -> None:
    """Check names and patterns of modules."""
    for name in ("target_modules", "exclude_modules"):
        value = settings.get(name)
        names = value if isinstance(value, list | set) else [value]
        if value is not None and not all(isinstance(each, str) for each in names):
            raise ValueError(f"its {name} are {quote(value)}")
    layers = settings.get("layers_pattern") or []
    for layer in [layers] if isinstance(layers, str) else layers:
        if not isinstance(layer, str) or not re.fullmatch(r"[\w.]*", layer):
            raise ValueError(f"its layers_pattern has {quote(layer)}, which is no name")
    for name in ("target_modules", "exclude_modules", *PATTERNS):
        value = settings.get(name)
        # a single string is a regular expression, and so is each key of a mapping
        patterns = [value] if isinstance(value, str) else value if isinstance(value, dict) else ()
        for pattern in patterns:
            try:
                if len(pattern) > LONGEST_PATTERN:
                    raise ValueError(f"it has more than {LONGEST_PATTERN} letters")
                re.compile(pattern)
                regex.compile(pattern)
            except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
                raise ValueError(
                    f"its {name} has {quote(pattern)}, which is not a regular expression: {error}"
                ) from error


def resolve_patterns(config: PeftConfig, modules: Iterable[str], file: Path) -> None:
    """Replace the patterns of module names in a configuration by the names that they match.

    They mean the same to PEFT, which would match them without end if they are made for that.

    Args:
        config: the configuration to change.
        modules: the names that patterns are matched with.
        file: the adapter's, for messages.

    Raises:
        UserError: if matching them takes too long.
    """
    names = list(modules)
    until = time.monotonic() + SECONDS
    try:
        for setting in PATTERNS:
            if by_pattern := config.to_dict().get(setting):
                matching = _match([rf"(?:.*\.)?(?:{key})" for key in by_pattern], names, until)
                values = list(by_pattern.values())
                setattr(config, setting, {name: values[index] for name, index in matching})
        if isinstance(config.exclude_modules, str):
            config.exclude_modules = {
                name for name, _ in _match([config.exclude_modules], names, until)
            }
    except TimeoutError:
        raise UserError(
            f"The configuration of {file} has patterns of module names that take more than"
            f" {SECONDS:g} seconds to match; name the modules in full."
        ) from None


def _match(
    patterns: Sequence[str], names: Sequence[str], until: float
) -> Iterator[tuple[str, int]]:
    """Yield each name that one of the patterns matches, with the place of the first that does."""
    compiled = [regex.compile(pattern) for pattern in patterns]
    for name in names:
        for index, pattern in enumerate(compiled):
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if pattern.fullmatch(name, timeout=left):
                yield name, index
                break
