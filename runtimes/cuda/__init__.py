"""Fox on a CUDA device: weights, KV cache, decode step and its kernels."""
