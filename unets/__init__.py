"""IF's UNets made small and fast: frozen and quantised weights, fused blocks, CUDA graphs."""

import os
import sys

MEMORY_SETTING = "expandable_segments:True"
"""The allocator setting that grows a GPU's memory in one piece, so that little of it lies idle."""

if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = MEMORY_SETTING  # torch reads it on import
    torch = sys.modules.get("torch")
    if torch is not None and torch.__version__ >= "2.10":  # later needs torch 2.10
        torch._C._accelerator_setAllocatorSettings(MEMORY_SETTING)
