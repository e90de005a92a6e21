"""The operations of a decode step, each of them on the device where its tensors are.

Tensors on a CUDA device go to the kernels of ops_triton.py, all others to the plain PyTorch of ops_torch.py;
what each operation does is told there. All shapes are static, and nothing waits for the device: a whole step
can be captured as one CUDA graph. Knows nothing of layers, conversations or memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fox_edge.errors import FoxEdgeError
from runtimes.cuda import ops_torch
from runtimes.cuda.ops_matrix import Dense, Matrix, Packed

__all__ = [
    "Dense",
    "Matrix",
    "Packed",
    "attend",
    "dequantize",
    "embed",
    "head",
    "linear_add",
    "norm_gate_up",
    "norm_linear",
    "tune",
]

# Whether tensors on the CPU go to the kernels as well: for tests, under Triton's interpreter
# (TRITON_INTERPRET=1 in the environment before anything imports triton).
kernels_on_cpu = False


def embed(matrix: Matrix, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Token ids (B,), int64 -> their rows (B, C) in `dtype`."""
    out: Tensor = _of(tokens).embed(matrix, tokens, dtype)
    return out


def norm_linear(x: Tensor, norm: Tensor, eps: float, matrix: Matrix) -> Tensor:
    """RMSNorm, then the product: (B, C) -> (B, N)."""
    out: Tensor = _of(x).norm_linear(x, norm, eps, matrix)
    return out


def linear_add(x: Tensor, matrix: Matrix, residual: Tensor) -> None:
    """Add the product of (B, K) with a matrix to the residual (B, N), in place."""
    _of(x).linear_add(x, matrix, residual)


def norm_gate_up(x: Tensor, norm: Tensor, eps: float, matrix: Matrix) -> Tensor:
    """silu(gate) * up of the normalized (B, C): (B, F); the matrix holds gate's F rows, then up's F."""
    out: Tensor = _of(x).norm_gate_up(x, norm, eps, matrix)
    return out


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """One new position of each conversation in one layer: (B, (H + 2K) * D) -> (B, H * D).

    keys, values (slots, K, S, D); slots, positions (B,) int32; cos, sin (S, D/2) float32. Rotates q and k,
    writes k and v to [slot, :, position], attends over [0, position]; what lies behind is not read.
    """
    out: Tensor = _of(qkv).attend(qkv, keys, values, slots, positions, cos, sin)
    return out


def head(x: Tensor, norm: Tensor, eps: float, matrix: Matrix) -> Tensor:
    """RMSNorm, then the logits: (B, C) -> (B, V), float32."""
    out: Tensor = _of(x).head(x, norm, eps, matrix)
    return out


def dequantize(matrix: Matrix, out: Tensor) -> Tensor:
    """Write what a matrix stands for to (N, C); returns it."""
    written: Tensor = _of(out).dequantize(matrix, out)
    return written


def tune(name: str, matrices: Sequence[Matrix], batch: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Find the quickest way to run one operation with these matrices of one shape, and keep to it.

    `name` is the operation's: norm_linear, linear_add, norm_gate_up, head. Only ways that give the very bits
    of the first are taken, so that a choice never changes an answer. Does nothing away from a CUDA device.
    """
    first = matrices[0]
    tensor = first.weight if isinstance(first, Dense) else first.integers
    if tensor.is_cuda:
        _of(tensor).tune(name, matrices, batch, dtype)


def _of(tensor: Tensor) -> ModuleType:
    """The module whose operations run where a tensor is."""
    if not tensor.is_cuda and not kernels_on_cpu:
        return ops_torch
    try:
        from runtimes.cuda import ops_triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise FoxEdgeError(
            "models on a CUDA device need Triton, which is not installed; add it with: pip install triton"
        ) from None
    return ops_triton
