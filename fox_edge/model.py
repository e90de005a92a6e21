"""The reference Fox in PyTorch: what every export is compared with.

Reads top to bottom: KV cache, norm, rotary positions, attention, feed-forward, block, transformer.
Knows nothing of files, tokens' meanings, sampling or quantization. Shapes: B batch, T new positions,
S cached positions, H query heads, K key/value heads, D head size, C hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fox_edge.config import FoxConfig
from fox_edge.errors import ContextOverflowError


class KVCache:
    """Keys and values of the positions seen so far, preallocated: (layers, B, K, S, D) each."""

    def __init__(
        self,
        config: FoxConfig,
        batch: int = 1,
        positions: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        positions = config.max_positions if positions is None else positions
        if not 0 < positions <= config.max_positions:
            raise ContextOverflowError(
                f"a context of {positions} positions was asked for, but 1 to {config.max_positions} exist"
            )
        shape = (config.num_layers, batch, config.num_kv_heads, positions, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def positions(self) -> int:
        """How many positions the cache can hold."""
        return self.keys.shape[3]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, D) after `length`; return all so far as (B, K, length + T, D)."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = min(self.length, length)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rotary_tables(config: FoxConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, D/2), float32, of position * theta^(-2i/D) (Su et al., 2021)."""
    i = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = config.rope_theta ** (-i / config.head_dim)
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (B, H, T, D) by the tables; dimension i pairs with i + D/2, as in Hugging Face's Llama."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal attention whose H query heads share K key/value heads (grouped-query attention)."""

    def __init__(self, config: FoxConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads, self.num_kv_heads = layer, config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        queries = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_dim, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.append(self.layer, k, v)
        # A lone new token sees everything; a first chunk is plainly causal; a later one needs its own mask.
        mask = None
        if past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=T > 1 and not past,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        # In place, since this is where a long prompt takes most memory.
        return self.down_proj(F.silu(self.gate_proj(x)).mul_(self.up_proj(x)))


class Block(nn.Module):
    """One pre-normalized layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: FoxConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm, under the names that checkpoints give them (`model.*`)."""

    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Fox(nn.Module):
    """The whole model. Tied means one tensor: a tied Fox has no `lm_head` at all."""

    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The (V, C) matrix that turns hidden states into logits: the embedding's own when tied."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) -> final hidden states (B, T, C); with a cache, T continues what it holds.

        Raises ContextOverflowError when the positions do not fit.
        """
        past = cache.length if cache is not None else 0
        room = cache.positions if cache is not None else self.config.max_positions
        T = tokens.shape[1]
        if past + T > room:
            raise ContextOverflowError(f"{past} positions and {T} more do not fit a context of {room}")
        cos, sin = rotary_tables(self.config, torch.arange(past, past + T, device=tokens.device))
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length = past + T
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V). Pass only the positions that someone will read."""
        return F.linear(hidden, self.head_weight)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V), or (B, 1, V) of the last position."""
        hidden = self.hidden(tokens, cache)
        return self.logits(hidden[:, -1:] if last_only else hidden)
