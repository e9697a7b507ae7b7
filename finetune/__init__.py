"""Parameter-efficient fine-tuning of DeepFloyd IF."""

from adapters.errors import __version__

__all__ = ["__version__"]
