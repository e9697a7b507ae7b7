"""The memory of a device, measured and given back."""

import gc
import resource

import torch

from unets.tally import GIB


def peak_memory_gib(device: torch.device) -> float:
    """The most memory reserved on the GPU; without one, the most this process has resided in."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def free_memory(device: torch.device) -> None:
    """Give memory that nothing refers to any more back to a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak_memory(device: torch.device) -> None:
    """Free memory and measure a GPU's peak from now on, so that it is that of training alone."""
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
