"""IF's UNets made small and fast: frozen and quantised weights, fused blocks, CUDA graphs."""

import os

import torch

MEMORY_SETTING = "expandable_segments:True"
"""A GPU's memory grows in one piece, so that little of it lies idle."""

if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = MEMORY_SETTING  # for processes that are yet to start
    if hasattr(torch._C, "_accelerator_setAllocatorSettings"):  # not before PyTorch 2.10
        torch._C._accelerator_setAllocatorSettings(MEMORY_SETTING)
