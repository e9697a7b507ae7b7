"""IF's UNets made small and fast: frozen and quantised weights, fused blocks, CUDA graphs."""
