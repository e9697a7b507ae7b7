"""Adapters of DeepFloyd IF, and the cascade that samples with them."""

import logging

# diffusers' IF pipelines import an image processor of which transformers then says that it would
# be faster with torchvision; nothing here needs that package
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

from adapters.cascade import Cascade
from adapters.embeds import load_embeds, save_embeds
from adapters.errors import UserError
from adapters.export import Exported, export_adapter
from adapters.images import CascadeImages, Sample
from adapters.info import AdapterInfo, read_info
from adapters.kinds import AdapterSpec, attach
from adapters.load import load_cascade
from adapters.picture_info import PictureInfo, read_picture_info
from adapters.sampling import Sampling

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
