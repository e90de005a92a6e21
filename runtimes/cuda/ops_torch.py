"""The operations of a decode step in plain PyTorch, on any device: what the kernels are compared with.

Each takes the input as it is and rounds once, at the end, to the input's type; sums are float32. Nothing
here looks at a value on the host, so that a step can be captured. Shapes: B conversations, C hidden size,
N rows of a matrix, F feed-forward size, H query heads, K key/value heads, D head size, S positions,
V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.cuda.ops_matrix import Dense, Matrix, Packed

# Weights of a packed matrix that stand as float32 at a time.
_STEP_WEIGHTS = 1 << 22


def embed(matrix: Matrix, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Token ids (B,) -> their rows (B, C)."""
    if isinstance(matrix, Dense):
        return F.embedding(tokens, matrix.weight).to(dtype)
    offsets = None if matrix.offsets is None else matrix.offsets[tokens]
    rows = matrix._replace(integers=matrix.integers[tokens], scales=matrix.scales[tokens], offsets=offsets)
    return values(rows).to(dtype)


def norm_linear(x: Tensor, norm: Tensor, eps: float, matrix: Matrix) -> Tensor:
    """(B, C) -> (B, N): RMSNorm, then the product."""
    return product(normalized(x, norm, eps), matrix).to(x.dtype)


def linear_add(x: Tensor, matrix: Matrix, residual: Tensor) -> None:
    """Add the product of (B, K) with a matrix to the residual (B, N), in place."""
    residual.copy_(residual.float() + product(x.float(), matrix))


def norm_gate_up(x: Tensor, norm: Tensor, eps: float, matrix: Matrix) -> Tensor:
    """(B, C) -> (B, F): silu(gate) * up of the normalized x; the matrix holds gate's F rows, then up's."""
    gate, up = product(normalized(x, norm, eps), matrix).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def head(x: Tensor, norm: Tensor, eps: float, matrix: Matrix) -> Tensor:
    """(B, C) -> logits (B, V), float32."""
    return product(normalized(x, norm, eps), matrix)


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """One new position of each conversation: (B, (H + 2K) * D) -> (B, H * D).

    Rotates the heads of q and k by the tables (S, D/2), writes k and v to [slot, :, position] of one layer's
    cache (slots, K, S, D), and attends over [0, position]. What the cache holds behind that is not read.
    """
    _, K, S, D = keys.shape
    B = qkv.shape[0]
    q, k, v = qkv.view(B, -1, D).split([qkv.shape[1] // D - 2 * K, K, K], dim=1)
    slots, positions = slots.long(), positions.long()
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    keys[slots, :, positions] = _rotated(k, cos, sin).to(keys.dtype)
    values[slots, :, positions] = v.to(values.dtype)
    seen = torch.arange(S, device=qkv.device) <= positions[:, None]  # (B, S)
    cached_k = keys[slots].float()  # (B, K, S, D)
    cached_v = values[slots].float().masked_fill(~seen[:, None, :, None], 0.0)  # 0 * NaN would be NaN
    grouped = _rotated(q, cos, sin).float().view(B, K, -1, D)  # (B, K, H / K, D)
    scores = (grouped @ cached_k.mT * D**-0.5).masked_fill(~seen[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ cached_v).to(qkv.dtype).view(B, -1)


def dequantize(matrix: Matrix, out: Tensor) -> Tensor:
    """Write the values of a matrix to (N, C), in its type."""
    if isinstance(matrix, Dense):
        return out.copy_(matrix.weight)
    step = max(1, _STEP_WEIGHTS // matrix.columns)
    for start in range(0, matrix.rows, step):
        out[start : start + step] = values(_rows(matrix, start, start + step))
    return out


def normalized(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * norm in float32 (Zhang and Sennrich, 2019), not rounded."""
    h = x.float()
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * norm.float()


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """(B, C) float32 times the rows of a matrix: (B, N) float32."""
    if isinstance(matrix, Dense):
        return F.linear(x.to(matrix.weight.dtype), matrix.weight).float()
    step = max(1, _STEP_WEIGHTS // matrix.columns)
    parts = [F.linear(x, values(_rows(matrix, at, at + step))) for at in range(0, matrix.rows, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def values(matrix: Packed) -> Tensor:
    """What the integers of a matrix stand for: (N, C) float32."""
    scales, integers = matrix.scales.float(), matrix.integers
    if matrix.bits == 4:
        integers = torch.stack((integers & 15, integers >> 4), dim=-1)
    blocks = integers.reshape(*scales.shape, matrix.block).float()
    if matrix.offsets is None:
        blocks = (blocks - matrix.zero) * scales[..., None]  # rounded once, as the files mean it
    else:
        blocks = blocks * scales[..., None] + matrix.offsets.float()[..., None]
    rows = blocks.flatten(1)
    return rows if matrix.factors is None else rows * matrix.factors


def _rows(matrix: Packed, start: int, stop: int) -> Packed:
    """Rows [start, stop) of a matrix, not copied."""
    offsets = None if matrix.offsets is None else matrix.offsets[start:stop]
    integers, scales = matrix.integers[start:stop], matrix.scales[start:stop]
    return matrix._replace(integers=integers, scales=scales, offsets=offsets)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads (B, heads, D) by (B, 1, D/2); dimension i pairs with i + D/2, as in fox_edge.model."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
