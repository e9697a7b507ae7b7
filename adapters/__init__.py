"""Adapters of DeepFloyd IF, and the cascade that samples with them."""

import logging

# diffusers' IF pipelines import an image processor of which transformers then says that it would
# be faster with torchvision; nothing here needs that package
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

from adapters.cascade import Cascade
from adapters.images import CascadeImages
from adapters.load import load_cascade

__all__ = ["Cascade", "CascadeImages", "load_cascade"]
