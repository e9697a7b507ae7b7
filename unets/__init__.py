"""IF's UNets made small and fast: frozen and quantised weights, fused blocks, CUDA graphs."""

import os

if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
    # read when PyTorch first uses a GPU: memory grows in one piece, so that little of it lies idle
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
