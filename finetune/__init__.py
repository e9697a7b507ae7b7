"""Parameter-efficient fine-tuning of DeepFloyd IF."""

__version__ = "0.1.0"
