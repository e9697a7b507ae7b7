"""Adapters of DeepFloyd IF, and the cascade that samples with them."""

from adapters.cascade import Cascade, CascadeImages, load_cascade

__all__ = ["Cascade", "CascadeImages", "load_cascade"]
