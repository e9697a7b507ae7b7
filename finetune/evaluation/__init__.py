"""Scores of a run, and pictures of the base and the fine-tuned cascade."""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.evaluation.measurement import evaluate as evaluate
    from finetune.evaluation.report import EvaluationReport as EvaluationReport

MODULES = MappingProxyType({"evaluate": "measurement", "EvaluationReport": "report"})
"""The module of each public name, imported when the name is first used."""

__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(f"{__name__}.{MODULES[name]}"))[name]
