"""Adapters of DeepFloyd IF, and the cascade that samples with them."""

import logging
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.cascade.cascade import Cascade as Cascade
    from adapters.cascade.embeds import load_embeds as load_embeds
    from adapters.cascade.embeds import save_embeds as save_embeds
    from adapters.cascade.load import Parts as Parts
    from adapters.cascade.load import load_cascade as load_cascade
    from adapters.cascade.provenance import PictureInfo as PictureInfo
    from adapters.cascade.provenance import read_picture_info as read_picture_info
    from adapters.cascade.results import CascadeImages as CascadeImages
    from adapters.cascade.results import Sample as Sample
    from adapters.cascade.sampling import Sampling as Sampling
    from adapters.cascade.sampling import StageSampling as StageSampling
    from adapters.errors import UserError as UserError
    from adapters.files.export import Exported as Exported
    from adapters.files.export import export_adapter as export_adapter
    from adapters.files.info import AdapterInfo as AdapterInfo
    from adapters.files.info import read_info as read_info
    from adapters.weights.kinds import AdapterSpec as AdapterSpec
    from adapters.weights.kinds import attach as attach

# diffusers' IF pipelines import an image processor, and transformers then warns that it would be
# faster with torchvision; nothing here needs that package
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

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
"""The module of each public name, imported when the name is first used: torch and diffusers take
seconds to import, and a command's ``--help`` should not wait for them."""

__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(f"{__name__}.{MODULES[name]}"))[name]
