"""What a decoder computes between two attentions, written so that XNNPACK takes all of it.

From the embedding's rows to the first attention, from one attention to the next, from the last one to the
logits: three modules, made of operators that XNNPACK has, with stand-ins for the weights, of the real shape
but all zeros. Knows operators and shapes, and what XNNPACK calls the stand-ins' data; not how a module is
lowered (pte_units.py), nor any weight's value.

Shapes: T new positions, C hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from fox_edge.config import FoxConfig
from fox_edge.quant import EMBEDDING, HEAD, QuantType

_INT8 = (torch.int8, -128, 127)
# XNNPACK reads two 4-bit integers from a byte, the first from the low half, each 8 above its value.
_ZEROS = {4: b"\x88", 8: b"\0"}


# The HF name of a matrix -> its type.
Types = Callable[[str], QuantType]


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint in a unit's payload, and the keys that ask for its data."""

    name: str
    key: str
    scales_key: str | None


class Vector(nn.Module):
    """Weights of one dimension (C,), named as in the checkpoint."""

    def __init__(self, name: str, columns: int, number: int) -> None:
        super().__init__()
        self.name = name
        # Stand-ins differ in their first value, so that the data of no two have the same digest.
        self.register_buffer("weight", torch.ones(columns))
        self.weight: Tensor
        self.weight[0] = number + 2

    def keys(self) -> Weight:
        """By which XNNPACK stores the stand-in: its digest."""
        return Weight(self.name, hashlib.sha256(self.weight.numpy().tobytes()).hexdigest(), None)

    def forward(self, x: Tensor) -> Tensor:
        """Every column of x (1, T, C) times its weight."""
        return x * self.weight


class Matrix(nn.Module):
    """Weights (N, C) and, where they are integers, a scale for each block of them."""

    def __init__(self, name: str, rows: int, columns: int, type_: QuantType, number: int) -> None:
        super().__init__()
        self.name, self.type = name, type_.of_row(columns)
        dtype = torch.int8 if type_.bits else torch.float32
        weight = torch.zeros(rows, columns, dtype=dtype)
        weight[0, :2] = torch.tensor([number // 8, number % 8], dtype=dtype)
        self.register_buffer("weight", weight)
        self.weight: Tensor
        if type_.bits:
            scales = torch.ones(rows, columns // self.type.block_size)
            scales[0, 0] += number / 128  # exact in bfloat16
            self.register_buffer("scales", scales)
            self.register_buffer("zeros", torch.zeros_like(scales, dtype=torch.int8))
        self.scales: Tensor
        self.zeros: Tensor

    def keys(self) -> Weight:
        """The digests of the stand-ins as XNNPACK stores them, which is how it names data."""
        if not self.type.bits:
            return Weight(self.name, hashlib.sha256(self.weight.numpy().tobytes()).hexdigest(), None)
        digits = self.weight[0, :2].tolist()
        first = bytes([digits[0] + 8 | digits[1] + 8 << 4]) if self.type.bits == 4 else bytes(digits)
        size = self.weight.numel() * self.type.bits // 8
        stored = self.scales if self.type.bits == 8 else self.scales.bfloat16().view(torch.int16)
        scales_key = hashlib.sha256(stored.numpy().tobytes()).hexdigest()
        return Weight(self.name, _digest(first, _ZEROS[self.type.bits], size), scales_key)

    def forward(self, x: _Input) -> Tensor:
        """x (1, T, C) -> (1, T, N)."""
        if not self.type.bits:
            return F.linear(x.exact, self.weight)
        low = -(2 ** (self.type.bits - 1))
        block = [1, self.type.block_size]
        weight = dequantize_affine(self.weight, block, self.scales, self.zeros, torch.int8, low, -low - 1)
        return F.linear(x.rounded, weight)


class _Input:
    """What several matrices read: rounded to int8 by row where their integers want it, at most once."""

    def __init__(self, x: Tensor, *readers: Matrix) -> None:
        self.exact = x
        if any(reader.type.bits for reader in readers):
            self.rounded = _through_int8(x)


def _through_int8(x: Tensor) -> Tensor:
    """Rows (1, T, C) rounded to int8, each with its own scale and zero point, as XNNPACK's kernels read."""
    block = [1, 1, x.shape[-1]]
    scale, zero = choose_qparams_affine(x, MappingType.ASYMMETRIC, block, *_INT8, zero_point_dtype=torch.int8)
    return dequantize_affine(quantize_affine(x, block, scale, zero, *_INT8), block, scale, zero, *_INT8)


class _Norm(nn.Module):
    """RMSNorm; the mean of squares is a product, since XNNPACK has no mean over the last dimension."""

    def __init__(self, name: str, config: FoxConfig, number: int) -> None:
        super().__init__()
        columns = config.hidden_size
        self.scale = Vector(name, columns, number)
        self.register_buffer("mean", torch.full((1, columns), 1 / columns))
        self.register_buffer("eps", torch.tensor([config.rms_norm_eps]))
        self.mean: Tensor
        self.eps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.scale(x * torch.rsqrt(F.linear(x * x, self.mean) + self.eps))
        return result


class _Before(nn.Module):
    """A layer up to its attention: (1, T, C) -> q (1, T, H, D), k and v (1, T, K, D)."""

    def __init__(self, config: FoxConfig, layer: int, types: Types) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        prefix, columns = f"model.layers.{layer}.", config.hidden_size
        self.norm = _Norm(f"{prefix}input_layernorm.weight", config, 1)

        def matrix(part: str, rows: int, number: int) -> Matrix:
            name = f"{prefix}self_attn.{part}_proj.weight"
            return Matrix(name, rows, columns, types(name), number)

        self.q = matrix("q", self.heads * self.head_dim, 2)
        self.k = matrix("k", config.kv_dim, 3)
        self.v = matrix("v", config.kv_dim, 4)
        half = torch.eye(self.head_dim // 2)
        none = torch.zeros_like(half)
        turn = torch.cat((torch.cat((none, -half), 1), torch.cat((half, none), 1)))
        self.register_buffer("turn", turn)
        self.turn: Tensor

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = _Input(self.norm(x), self.q, self.k, self.v)
        q = self.q(h).view(1, -1, self.heads, self.head_dim)
        k = self.k(h).view(1, -1, self.kv_heads, self.head_dim)
        v = self.v(h).view(1, -1, self.kv_heads, self.head_dim)
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin), v

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As model.rotate. XNNPACK cannot cut a tensor of open length in two: a product swaps the halves."""
        return x * cos + F.linear(x, self.turn) * sin


class _Behind(nn.Module):
    """A layer from its attention on: x (1, T, C), y (1, T, H, D) -> (1, T, C)."""

    def __init__(self, config: FoxConfig, layer: int, types: Types) -> None:
        super().__init__()
        prefix, columns, inner = f"model.layers.{layer}.", config.hidden_size, config.intermediate_size

        def matrix(part: str, rows: int, columns: int, number: int) -> Matrix:
            name = f"{prefix}{part}_proj.weight"
            return Matrix(name, rows, columns, types(name), number)

        self.attended = config.num_heads * config.head_dim
        self.o = matrix("self_attn.o", columns, self.attended, 5)
        self.norm = _Norm(f"{prefix}post_attention_layernorm.weight", config, 6)
        self.gate = matrix("mlp.gate", inner, columns, 7)
        self.up = matrix("mlp.up", inner, columns, 8)
        self.down = matrix("mlp.down", columns, inner, 9)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.o(_Input(y.view(1, -1, self.attended), self.o))
        h = _Input(self.norm(x), self.gate, self.up)
        gate = self.gate(h)
        inner = gate * torch.sigmoid(gate) * self.up(h)
        result: Tensor = x + self.down(_Input(inner, self.down))
        return result


class _Lookup(nn.Module):
    """Rows of the embedding as they lie in the file, as float32, to hidden states (1, T, C)."""

    def __init__(self, config: FoxConfig, type_: QuantType, scaled_columns: bool) -> None:
        super().__init__()
        self.columns, self.type = config.hidden_size, type_.of_row(config.hidden_size)
        for name, value in (("one", 1.0), ("sixteenth", 1 / 16), ("sixteen", 16.0), ("eight", 8.0)):
            self.register_buffer(name, torch.tensor([value]))
        self.one: Tensor
        self.sixteenth: Tensor
        self.sixteen: Tensor
        self.eight: Tensor
        self.column_scales = Vector(COLUMN_SCALES, self.columns, 10) if scaled_columns else nn.Identity()

    def forward(self, stored: Tensor, scales: Tensor) -> Tensor:
        x = stored
        if self.type.bits == 4:
            high = torch.floor(stored * self.sixteenth)
            low = stored - high * self.sixteen
            pairs = [half.view(1, -1, self.columns // 2, 1) for half in (low, high)]
            x = (torch.cat(pairs, -1) - self.eight).view(1, -1, self.columns)
        if self.type.bits:
            blocks = self.columns // self.type.block_size
            x = x.view(1, -1, blocks, self.type.block_size) * scales.view(1, -1, blocks, 1)
            x = x.view(1, -1, self.columns)
        else:
            x = x * self.one  # a delegate does not pass an input on
        result: Tensor = self.column_scales(x)
        return result


# The factors of an embedding's columns: no tensor of the checkpoint.
COLUMN_SCALES = f"{EMBEDDING}.column_scales"


class First(nn.Module):
    """From the embedding's rows to the first attention."""

    def __init__(self, config: FoxConfig, types: Types, scaled_columns: bool) -> None:
        super().__init__()
        self.lookup = _Lookup(config, types(EMBEDDING), scaled_columns)
        self.before = _Before(config, 0, types)

    def forward(self, stored: Tensor, scales: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Rows as they are stored, and turns (1, T, 1, D) -> x (1, T, C), and q, k, v."""
        x = self.lookup(stored, scales)
        return x, *self.before(x, cos, sin)


class Middle(nn.Module):
    """From the attention before a layer to this layer's own."""

    def __init__(self, config: FoxConfig, layer: int, types: Types) -> None:
        super().__init__()
        self.behind, self.before = _Behind(config, layer - 1, types), _Before(config, layer, types)

    def forward(self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """x (1, T, C), what was attended y (1, T, H, D), and turns -> x, and q, k, v."""
        x = self.behind(x, y)
        return x, *self.before(x, cos, sin)


class Last(nn.Module):
    """From the last attention to logits (1, T, V)."""

    def __init__(self, config: FoxConfig, types: Types, scaled_columns: bool) -> None:
        super().__init__()
        name = EMBEDDING if config.tied else HEAD
        self.behind = _Behind(config, config.num_layers - 1, types)
        self.norm = _Norm("model.norm.weight", config, 11)
        columns = config.hidden_size
        self.column_scales = Vector(COLUMN_SCALES, columns, 10) if scaled_columns else nn.Identity()
        self.head = Matrix(name, config.vocab_size, columns, types(name), 12)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        """x (1, T, C), what was attended y (1, T, H, D) -> logits (1, T, V)."""
        h = self.column_scales(self.norm(self.behind(x, y)))
        return (self.head(_Input(h, self.head)),)


def _digest(first: bytes, rest: bytes, size: int) -> str:
    """sha256 of `size` bytes that begin with `first` and go on with one byte over and over."""
    digest = hashlib.sha256(first)
    left, piece = size - len(first), rest * (1 << 20)
    while left:
        digest.update(piece[:left])
        left -= min(left, len(piece))
    return digest.hexdigest()
