"""Adapters of DeepFloyd IF, and the cascade that samples with them."""

from adapters.cascade import Cascade
from adapters.images import CascadeImages
from adapters.load import load_cascade

__all__ = ["Cascade", "CascadeImages", "load_cascade"]
