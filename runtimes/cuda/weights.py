"""A model's weights in device memory, each once: fused matrices in one block of memory, and how it is filled.

What is computed together lies together: q, k and v; gate and up. A tied matrix is one. Knows which tensors
those are; not which file they come from, nor what is computed with them.

Shapes: C hidden size, H query heads, K key/value heads, D head size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from fox_edge.quant import EMBEDDING, HEAD
from runtimes.cuda.form import Allocate, Form, put
from runtimes.cuda.ops import Dense, Matrix
from runtimes.cuda.sources import Source

# Where every tensor begins: what the widest loads want, and two cache lines.
_ALIGNMENT = 256

Progress = Callable[[int, int], None]


class Layer(NamedTuple):
    """The weights of one layer."""

    attention_norm: Tensor  # (C,) float32
    qkv: Matrix  # ((H + 2K) * D, C)
    o: Matrix  # (C, H * D)
    mlp_norm: Tensor  # (C,) float32
    gate_up: Matrix  # (2F, C)
    down: Matrix  # (C, F)


class Weights(NamedTuple):
    """All of them. Tied means one matrix: `head` is `embedding`."""

    embedding: Matrix  # (V, C)
    layers: tuple[Layer, ...]
    norm: Tensor  # (C,) float32
    head: Matrix  # (V, C)

    def largest(self) -> int:
        """Weights of the largest matrix of a layer that is not dense; 0 where all are."""
        matrices = [m for layer in self.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return max((m.rows * m.columns for m in matrices if not isinstance(m, Dense)), default=0)


class Arena:
    """One block of device memory that tensors are taken from, one behind the other.

    The device's allocator would round each of them up, and leave gaps.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor."""
        size = math.prod(shape) * dtype.itemsize
        found = self._bytes[self._used : self._used + size].view(dtype).view(shape)
        self._used += aligned(size)
        return found


class Ruler:
    """Takes nothing, and counts what an arena would have to hold."""

    def __init__(self) -> None:
        self.nbytes = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor without memory."""
        self.nbytes += aligned(math.prod(shape) * dtype.itemsize)
        return torch.empty(shape, dtype=dtype, device="meta")


class _Place(NamedTuple):
    """Where a tensor of the checkpoint goes: rows of a matrix from `first` on, or a vector."""

    tensor: str
    target: Matrix | Tensor
    first: int = 0


def lay_out(source: Source, dtype: torch.dtype, take: Allocate) -> tuple[Weights, list[_Place]]:
    """The weights, not filled, and what is to be put where. Floats are of `dtype`, norms of float32."""
    shapes, places = source.config.tensor_shapes(), list[_Place]()

    def vector(name: str) -> Tensor:
        held = take(shapes[name], torch.float32)
        places.append(_Place(name, held))
        return held

    def matrix(*names: str) -> Matrix:
        form = reduce(Form.join, (source.form(name) for name in names))
        held = form.make(sum(shapes[name][0] for name in names), shapes[names[0]][1], dtype, take)
        first = 0
        for name in names:
            places.append(_Place(name, held, first))
            first += shapes[name][0]
        return held

    def layer(number: int) -> Layer:
        at = f"model.layers.{number}."
        attention = at + "self_attn."
        return Layer(
            vector(f"{at}input_layernorm.weight"),
            matrix(*(f"{attention}{part}_proj.weight" for part in "qkv")),
            matrix(f"{attention}o_proj.weight"),
            vector(f"{at}post_attention_layernorm.weight"),
            matrix(f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight"),
            matrix(f"{at}mlp.down_proj.weight"),
        )

    embedding = matrix(EMBEDDING)
    layers = tuple(layer(number) for number in range(source.config.num_layers))
    norm = vector("model.norm.weight")
    head = embedding if source.config.tied else matrix(HEAD)
    return Weights(embedding, layers, norm, head), places


def weight_bytes(source: Source, dtype: torch.dtype) -> int:
    """Device memory that the weights will take, told from headers."""
    ruler = Ruler()
    lay_out(source, dtype, ruler.take)
    return ruler.nbytes


def load(
    source: Source, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> Weights:
    """The weights on the device, piece by piece from their files."""
    arena = Arena(weight_bytes(source, dtype), device)
    weights, places = lay_out(source, dtype, arena.take)
    shapes, done = source.config.tensor_shapes(), 0
    for place in places:
        _fill(place, source, device)
        done += math.prod(shapes[place.tensor])
        if progress is not None:
            progress(done, source.config.num_parameters())
    return weights


def _fill(place: _Place, source: Source, device: torch.device) -> None:
    target = place.target
    for start, rows in source.pieces(place.tensor, device):
        if isinstance(target, Tensor):
            assert isinstance(rows, Tensor)
            target.copy_(rows[0])
        else:
            put(target, place.first + start, rows, place.tensor)
    if not isinstance(target, Tensor | Dense) and target.factors is not None:
        factors = source.factors(place.tensor)
        assert factors is not None
        target.factors.copy_(factors)


def aligned(size: int) -> int:
    """Bytes up to where the next tensor may begin."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
