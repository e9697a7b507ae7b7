"""Adapters of DeepFloyd IF, and the cascade that samples with them."""

import logging
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.cascade.cascade import Cascade
    from adapters.cascade.embeds import load_embeds, save_embeds
    from adapters.cascade.load import Parts, load_cascade
    from adapters.cascade.provenance import PictureInfo, read_picture_info
    from adapters.cascade.results import CascadeImages, Sample
    from adapters.cascade.sampling import Sampling, StageSampling
    from adapters.errors import UserError
    from adapters.files.export import Exported, export_adapter
    from adapters.files.info import AdapterInfo, read_info
    from adapters.weights.kinds import AdapterSpec, attach

# diffusers' IF pipelines import an image processor of which transformers then says that it would
# be faster with torchvision; nothing here needs that package
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

__all__ = [
    "load_cascade",
    "Parts",
    "Cascade",
    "Sampling",
    "StageSampling",
    "CascadeImages",
    "Sample",
    "PictureInfo",
    "read_picture_info",
    "save_embeds",
    "load_embeds",
    "AdapterSpec",
    "attach",
    "AdapterInfo",
    "export_adapter",
    "Exported",
    "read_info",
    "UserError",
]

MODULES = MappingProxyType(
    {
        **dict.fromkeys(("load_cascade", "Parts"), "cascade.load"),
        "Cascade": "cascade.cascade",
        **dict.fromkeys(("Sampling", "StageSampling"), "cascade.sampling"),
        **dict.fromkeys(("CascadeImages", "Sample"), "cascade.results"),
        **dict.fromkeys(("PictureInfo", "read_picture_info"), "cascade.provenance"),
        **dict.fromkeys(("save_embeds", "load_embeds"), "cascade.embeds"),
        **dict.fromkeys(("AdapterSpec", "attach"), "weights.kinds"),
        **dict.fromkeys(("export_adapter", "Exported"), "files.export"),
        **dict.fromkeys(("AdapterInfo", "read_info"), "files.info"),
        "UserError": "errors",
    }
)
"""The module of each public name, imported when the name is used: torch and diffusers take seconds,
which a command's ``--help`` should not."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(f"{__name__}.{MODULES[name]}"))[name]


def __dir__() -> list[str]:
    return [*globals(), *__all__]
