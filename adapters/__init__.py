"""Adapters of DeepFloyd IF, and the cascade that samples with them."""

import logging

# diffusers' IF pipelines import an image processor of which transformers then says that it would
# be faster with torchvision; nothing here needs that package
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

from adapters.cascade.cascade import Cascade
from adapters.cascade.embeds import load_embeds, save_embeds
from adapters.cascade.load import load_cascade
from adapters.cascade.provenance import PictureInfo, read_picture_info
from adapters.cascade.results import CascadeImages, Sample
from adapters.cascade.sampling import Sampling
from adapters.errors import UserError
from adapters.files.export import Exported, export_adapter
from adapters.files.info import AdapterInfo, read_info
from adapters.weights.kinds import AdapterSpec, attach

__all__ = [
    "load_cascade",
    "Cascade",
    "Sampling",
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
