"""Prompts: many tokens of one conversation at a time, through large products and fused attention.

What bounds a prompt is arithmetic, which PyTorch's own matrix products and attention do as fast as the device
can; integers are dequantized into a scratch first, once per chunk. Knows weights and the cache of one slot;
not conversations, nor what the logits are for.

Shapes: T new tokens, C hidden size, H query heads, K key/value heads, D head size, S cached positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fox_edge.config import FoxConfig
from fox_edge.model import rotate
from runtimes.cuda import ops
from runtimes.cuda.ops import Dense, Matrix
from runtimes.cuda.slots import Slots
from runtimes.cuda.weights import Layer, Weights

# Tokens that run at once: enough for full speed, few enough that intermediate results stay small.
CUDA_CHUNK, CPU_CHUNK = 2048, 512


def chunk_of(device: torch.device) -> int:
    """The same for a device."""
    return CUDA_CHUNK if device.type == "cuda" else CPU_CHUNK


class Prompts:
    """Runs the tokens of a prompt. `cos`, `sin` (S, D/2) are the rotary tables of all positions."""

    def __init__(self, config: FoxConfig, weights: Weights, slots: Slots, cos: Tensor, sin: Tensor) -> None:
        self._config, self._weights, self._slots = config, weights, slots
        self._cos, self._sin = cos, sin
        self._dtype, self._device = slots.keys.dtype, slots.keys.device
        self._scratch = torch.empty(weights.largest(), dtype=self._dtype, device=self._device)

    def run(self, tokens: Sequence[int], slot: int, past: int) -> Iterator[Tensor]:
        """Append tokens to a slot that holds `past`: hidden states (n, C) of each chunk, not normed."""
        ids = torch.tensor(list(tokens), dtype=torch.int64).to(self._device)
        step = chunk_of(self._device)
        for first in range(0, len(tokens), step):
            yield self._chunk(ids[first : first + step], slot, past + first)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, C) of `run` -> logits (n, V), float32."""
        weights = self._weights
        return ops.head(hidden, weights.norm, self._config.rms_norm_eps, weights.head)

    @torch.inference_mode()
    def _chunk(self, ids: Tensor, slot: int, past: int) -> Tensor:
        """(T,) -> (T, C)."""
        x = ops.embed(self._weights.embedding, ids, self._dtype)
        for number, layer in enumerate(self._weights.layers):
            self._attend(x, layer, number, slot, past)
            self._feed_forward(x, layer)
        return x

    def _attend(self, x: Tensor, layer: Layer, number: int, slot: int, past: int) -> None:
        """Add one layer's attention to x (T, C)."""
        c, T = self._config, len(x)
        cos, sin = self._cos[past : past + T], self._sin[past : past + T]
        heads = self._linear(self._norm(x, layer.attention_norm), layer.qkv).view(T, -1, c.head_dim)
        q, k, v = heads.transpose(0, 1).split((c.num_heads, c.num_kv_heads, c.num_kv_heads))  # (heads, T, D)
        keys = self._slots.keys[number, slot, :, : past + T]  # (K, S, D)
        values = self._slots.values[number, slot, :, : past + T]
        keys[:, past:] = rotate(k, cos, sin)
        values[:, past:] = v
        y = _attention(rotate(q, cos, sin), keys, values)
        self._add(x, y.transpose(0, 1).reshape(T, -1), layer.o)

    def _feed_forward(self, x: Tensor, layer: Layer) -> None:
        """Add one layer's feed-forward to x (T, C)."""
        gate, up = self._linear(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        self._add(x, F.silu(gate).mul_(up), layer.down)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return _rms_norm(x, weight, self._config.rms_norm_eps)

    def _linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """(T, C) -> (T, N)."""
        return F.linear(x, self._floats(matrix))

    def _add(self, x: Tensor, y: Tensor, matrix: Matrix) -> None:
        """Add the product of y (T, K) with a matrix to x (T, N), in place, in one pass over it."""
        x.addmm_(y, self._floats(matrix).t())

    def _floats(self, matrix: Matrix) -> Tensor:
        """A matrix (N, C) as plain numbers, which last until the next one is asked for."""
        if isinstance(matrix, Dense):
            return matrix.weight
        out = self._scratch[: matrix.rows * matrix.columns].view(matrix.rows, matrix.columns)
        return ops.dequantize(matrix, out)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of (T, C) in float32, rounded once: on a GPU one kernel."""
    if x.device.type == "cuda":
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last T positions: q (H, T, D), keys and values (K, S, D) -> (H, T, D)."""
    (heads, T, _), (groups, S, _) = q.shape, keys.shape
    grouped = heads != groups
    q, keys, values = q[None], keys[None], values[None]
    if T == S:
        y = F.scaled_dot_product_attention(q, keys, values, is_causal=T > 1, enable_gqa=grouped)
    elif q.device.type == "cuda":
        # Flash attention, which needs no mask in memory.
        bias = causal_lower_right(T, S)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, enable_gqa=grouped)
    else:
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=grouped)
    return y[0]
