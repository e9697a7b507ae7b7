"""Measuring and freeing of a device's memory."""

import gc
import resource

import torch

from unets.tally import GIB


def peak_memory_gib(device: torch.device) -> float:
    """Return the GPU's peak of reserved memory in GiB; for a CPU, the process's peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def free_memory(device: torch.device) -> None:
    """Collect garbage, and return unused cached memory to a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak_memory(device: torch.device) -> None:
    """Free memory and restart a GPU's peak, so that the peak does not include earlier work."""
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
