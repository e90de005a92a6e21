"""Prompts: many tokens of one conversation at a time, through large products and fused attention.

What bounds a long prompt is arithmetic, which PyTorch's own matrix products and attention do as fast as the
device can; integers are dequantized into a scratch first, once per chunk. What bounds a short one is the
host, which launches some 400 kernels: so on a GPU it is filled up to one of a few lengths, each of them a
CUDA graph. Knows weights and the cache of one slot; not conversations, nor what the logits are for.

Shapes: T new tokens, C hidden size, H query heads, K key/value heads, D head size, S cached positions.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fox_edge.config import FoxConfig
from fox_edge.model import rotate
from runtimes.cuda import ops
from runtimes.cuda.decoder import Inputs
from runtimes.cuda.graphs import Graphs
from runtimes.cuda.ops import Dense, Matrix
from runtimes.cuda.slots import Slots
from runtimes.cuda.weights import Layer, Weights

# Tokens that run at once: enough for full speed, few enough that intermediate results stay small.
CUDA_CHUNK, CPU_CHUNK = 2048, 512
# Lengths of a prompt that there is a graph for: from some 400 tokens on, a GPU is busy for longer than the
# host takes to launch what it does.
LENGTHS = (16, 32, 64, 128, 192, 256, 384)
# Positions that such a prompt looks at when others are before it: none of its own, and then these.
REACHES = (256, 512, 1024, 2048)

# The number of a layer, q (H, T, D), k and v (K, T, D), turned -> (H, T, D).
Attention: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def chunk_of(device: torch.device) -> int:
    """Tokens that run at once on a device."""
    return CUDA_CHUNK if device.type == "cuda" else CPU_CHUNK


def fills_up(device: torch.device) -> bool:
    """Whether short prompts are filled up: only where that saves launches."""
    return device.type == "cuda"


class Prompts:
    """Runs the tokens of a prompt. `cos`, `sin` (S, D/2) are the rotary tables of all positions."""

    def __init__(
        self, config: FoxConfig, weights: Weights, slots: Slots, cos: Tensor, sin: Tensor, graphs: Graphs
    ) -> None:
        self._config, self._weights, self._slots = config, weights, slots
        self._cos, self._sin, self._graphs = cos, sin, graphs
        self._dtype, self._device = slots.keys.dtype, slots.keys.device
        self._scratch = torch.empty(weights.largest(), dtype=self._dtype, device=self._device)
        self._inputs: dict[int, Inputs] = {}

    def run(self, tokens: Sequence[int], slot: int, past: int) -> Iterator[Tensor]:
        """Append tokens to a slot that holds `past`: hidden states (n, C) of each chunk, not normed.

        They last until the next chunk.
        """
        step = chunk_of(self._device)
        for first in range(0, len(tokens), step):
            yield self._chunk(tokens[first : first + step], slot, past + first)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, C) of `run` -> logits (n, V), float32."""
        weights = self._weights
        return ops.head(hidden, weights.norm, self._config.rms_norm_eps, weights.head)

    @torch.inference_mode()
    def _chunk(self, tokens: Sequence[int], slot: int, past: int) -> Tensor:
        """T tokens -> (T, C)."""
        T = len(tokens)
        if fills_up(self._device) and (size := filled_up(T, past, self._slots.positions)) is not None:
            return self._fixed(tokens, slot, past, *size)[:T]
        ids = torch.tensor(list(tokens), dtype=torch.int64).to(self._device)
        cos, sin = self._cos[past : past + T], self._sin[past : past + T]
        return self._pass(ids, cos, sin, partial(self._append, slot, past))

    def _append(self, slot: int, past: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of tokens that come after `past` others in a slot, where k and v are kept."""
        seen = past + q.shape[1]
        keys, values = (held[layer, slot, :, :seen] for held in (self._slots.keys, self._slots.values))
        keys[:, past:], values[:, past:] = k, v
        return _attention(q, keys, values)

    def _fixed(self, tokens: Sequence[int], slot: int, past: int, length: int, reach: int) -> Tensor:
        """The same for so many tokens (length, C), the last of which are no one's and come behind the end.

        What they leave in the slot lies behind the end too, where nobody looks before it is written again.
        """
        if length not in self._inputs:
            self._inputs[length] = Inputs(length, self._device)
        at = self._inputs[length]
        at.fill([slot] * length, range(past, past + length), [*tokens, *[0] * (length - len(tokens))], slot)
        return self._graphs.run(("prompt", length, reach), lambda: self._filled(at, reach), at_once=False)

    def _filled(self, at: Inputs, reach: int) -> Tensor:
        """The pass over what lies in its place, which looks at no value on the host."""
        positions = at.positions.long()
        cos, sin = self._cos[positions], self._sin[positions]
        seen = torch.arange(reach, device=self._device) <= positions[:, None]  # (T, S)
        bias = torch.zeros(seen.shape, dtype=self._dtype, device=self._device).masked_fill_(~seen, -torch.inf)
        return self._pass(at.tokens, cos, sin, partial(self._place, at.slots.long(), positions, bias))

    def _place(
        self, slots: Tensor, positions: Tensor, bias: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Attention of tokens at `positions` (T,) of a slot, which `slots` (T,) repeats.

        `bias` (T, S) is for the S positions that they look at, beside themselves; none at the slot's start.
        """
        keys, values = self._slots.keys[layer], self._slots.values[layer]  # (slots, K, S, D)
        keys[slots, :, positions], values[slots, :, positions] = k.transpose(0, 1), v.transpose(0, 1)
        reach = bias.shape[1]
        if not reach:
            return _attention(q, k, v)
        past_keys, past_values = (part[:, :, :reach].index_select(0, slots[:1])[0] for part in (keys, values))
        return _biased_attention(q, past_keys, past_values, bias)

    def _pass(self, ids: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        """Tokens (T,), turned by cos and sin (T, D/2) -> (T, C)."""
        c = self._config
        x = ops.embed(self._weights.embedding, ids, self._dtype)
        for number, layer in enumerate(self._weights.layers):
            heads = self._linear(self._norm(x, layer.attention_norm), layer.qkv).view(len(x), -1, c.head_dim)
            q, k, v = heads.transpose(0, 1).split((c.num_heads, c.num_kv_heads, c.num_kv_heads))
            y = attention(number, rotate(q, cos, sin), rotate(k, cos, sin), v)
            self._add(x, y.transpose(0, 1).reshape(len(x), -1), layer.o)
            self._feed_forward(x, layer)
        return x

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


def _biased_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of q (H, T, D) to keys and values (K, S, D), with `bias` (T, S) on the scores -> (H, T, D).

    Key/value heads are a batch, and the query heads of each its heads: so nothing is repeated in memory, and
    kernels that take a bias but know no groups will do.
    """
    (heads, T, D), (groups, S, _) = q.shape, keys.shape
    shape = (groups, heads // groups, S, D)
    q = q.reshape(groups, heads // groups, T, D)
    return F.scaled_dot_product_attention(
        q, keys[:, None].expand(shape), values[:, None].expand(shape), attn_mask=bias
    ).reshape(heads, T, D)


def filled_up(tokens: int, past: int, positions: int) -> tuple[int, int] | None:
    """What a prompt after `past` others is filled up to: its length and its reach, 0 at the start of a slot.

    None where it is too long for a graph, looks too far back, or would not fit the slot's positions.
    """
    place = bisect.bisect_left(LENGTHS, tokens)
    if place == len(LENGTHS) or past + LENGTHS[place] > positions:
        return None
    length = LENGTHS[place]
    reaches = [0] if past == 0 else [min(r, positions) for r in REACHES if min(r, positions) >= past + length]
    return (length, reaches[0]) if reaches else None
