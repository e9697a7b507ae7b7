"""Wishes to Accelerate's launcher that a run does not fulfil."""

from collections.abc import Mapping
from types import MappingProxyType

from adapters.errors import UserError

ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "ACCELERATE_USE_FSDP": "FSDP",
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "the sharding of a model over devices",
    }
)
"""Engines that shard a model, by the launcher's variable that asks for each."""

SETTINGS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "no", "precision of each stage"),
        "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "no", "compile of each stage"),
    }
)
"""Settings that a recipe has too: by the launcher's variable the setting's name, the value that
asks for nothing, and what decides instead."""


def check_launcher(environment: Mapping[str, str]) -> list[str]:
    """Check what a launcher asks for, by the variables that it has set.

    Returns:
        Sentences on what has no effect.

    Raises:
        UserError: if it asks for an engine that shards the model.
    """
    for variable, engine in ENGINES.items():
        if environment.get(variable, "").lower() in ("true", "1"):
            raise UserError(
                f"The launcher was asked for {engine}, which has nothing to shard: all that trains"
                " is an adapter of some megabytes. Launch with --multi_gpu instead, as"
                " recipes/accelerate/ does; on a small card set precision: nf4 for each stage."
            )
    return [
        f"The launcher's {name} ({environment[variable].lower()}) has no effect: the recipe's"
        f" {decides} decides."
        for variable, (name, nothing, decides) in SETTINGS.items()
        if environment.get(variable, nothing).lower() != nothing
    ]
