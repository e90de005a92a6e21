"""What lies where in an ONNX artifact's data file: decided before the first weight is read.

Turns a configuration and its resolved recipe into matrices (one or several checkpoint tensors stacked), each
with the byte ranges of its integers, scales and zero points. Knows names, shapes and offsets; not the graph
that reads them, nor any weight's value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fox_edge.config import FoxConfig
from fox_edge.errors import RecipeError
from fox_edge.quant import EMBEDDING, HEAD, Assignment, QuantType

# Large ranges start on a page, so that a runtime maps them without touching their neighbours.
PAGE_BYTES = 4096
LINE_BYTES = 64

# Rotary tables: cosines and sines (positions, head_dim / 2). Not weights: computed from the configuration.
COS, SIN = "rotary.cos", "rotary.sin"


@dataclass(frozen=True)
class Range:
    """A tensor of the data file: name, element type ('uint8' or 'float32'), shape, place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * {"uint8": 1, "float32": 4}[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (one step of the first dimension)."""
        return self.nbytes // self.shape[0]

    def rows(self, start: int, stop: int, name: str) -> Range:
        """Rows [start, stop) as a tensor of their own name."""
        return Range(name, self.dtype, (stop - start, *self.shape[1:]), self.offset + start * self.row_bytes)


@dataclass(frozen=True)
class Matrix:
    """Checkpoint matrices of one type and one input, stacked row over row.

    `weight` is packed integers (rows, blocks, bytes per block), or floats (rows, columns).
    """

    name: str
    sources: tuple[str, ...]
    source_rows: tuple[int, ...]
    columns: int
    type: QuantType
    weight: Range
    scales: Range | None = None
    zero_points: Range | None = None

    @property
    def rows(self) -> int:
        """Rows of all sources together."""
        return sum(self.source_rows)

    def slices(self, limit_bytes: int) -> list[Matrix]:
        """The same bytes as matrices of consecutive rows, each about `limit_bytes`; floats stay whole."""
        count = -(-self.weight.nbytes // limit_bytes)
        if count == 1 or self.scales is None:
            return [self]
        step = -(-self.rows // count)
        return [
            self._slice(i, start, min(start + step, self.rows))
            for i, start in enumerate(range(0, self.rows, step))
        ]

    def _slice(self, i: int, start: int, stop: int) -> Matrix:
        weight, *rest = (
            part and part.rows(start, stop, f"{HEAD}.{i}{suffix}")
            for part, suffix in (
                (self.weight, ""),
                (self.scales, ".scales"),
                (self.zero_points, ".zero_points"),
            )
        )
        assert weight is not None
        return Matrix(weight.name, self.sources, (stop - start,), self.columns, self.type, weight, *rest)

    def first_row(self, source: str) -> int:
        """Where the rows of one source begin."""
        return sum(self.source_rows[: self.sources.index(source)])

    def stored_as(self, source: str) -> str:
        """What the manifest says of one source: the initializer, and the rows of it when it is shared."""
        if len(self.sources) == 1:
            return self.weight.name
        first = self.first_row(source)
        return f"{self.weight.name}[{first}:{first + self.source_rows[self.sources.index(source)]}]"


@dataclass(frozen=True)
class Layout:
    """Every tensor of the data file by name: matrices, vectors (norms) and tables (rotary).

    `column_scales` has, for an embedding or head whose columns were divided by factors before rounding, the
    place of these factors (C,): what a lookup gives, and what the head reads, is multiplied by them.
    """

    matrices: dict[str, Matrix]
    vectors: dict[str, Range]
    tables: dict[str, Range]
    nbytes: int
    column_scales: dict[str, Range]

    @property
    def table_bytes(self) -> int:
        """Bytes of the rotary tables."""
        return sum(table.nbytes for table in self.tables.values())

    def matrix_of(self, source: str) -> Matrix:
        """The matrix that holds a checkpoint tensor."""
        return next(m for m in self.matrices.values() if source in m.sources)


def plan(config: FoxConfig, assignments: dict[str, Assignment]) -> Layout:
    """Lay the tensors of a model out, in the order in which a forward pass reads them.

    Raises RecipeError when a row does not hold the type it was given.
    """
    shapes = config.tensor_shapes()
    place = _Placer()
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, Range] = {}
    for name, sources in _stacks(config, assignments):
        if len(shapes[sources[0]]) == 1:
            vectors[name] = place.put(name, "float32", shapes[name])
        else:
            matrices[name] = _matrix(
                name, sources, [shapes[s] for s in sources], assignments[sources[0]].type, place
            )
    table = (config.max_positions, config.head_dim // 2)
    tables = {name: place.put(name, "float32", table) for name in (COS, SIN)}
    scales = {
        name: place.put(f"{name}.column_scales", "float32", (shapes[name][1],))
        for name in (EMBEDDING, HEAD)
        if name in matrices and matrices[name].scales is not None
    }
    return Layout(matrices, vectors, tables, place.end, scales)


def _stacks(config: FoxConfig, assignments: dict[str, Assignment]) -> list[tuple[str, tuple[str, ...]]]:
    """Stored name and sources of every tensor: projections that read the same input share one product.

    One product over stacked rows costs one quantization of its input and one start of the threads instead
    of three. Sources of different types stay apart.
    """
    stacks: list[tuple[str, tuple[str, ...]]] = [(EMBEDDING, (EMBEDDING,))]
    for n in range(config.num_layers):
        layer = f"model.layers.{n}."
        for group, stacked in (
            (("input_layernorm",), None),
            (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv_proj"),
            (("self_attn.o_proj",), None),
            (("post_attention_layernorm",), None),
            (("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"),
            (("mlp.down_proj",), None),
        ):
            sources = tuple(f"{layer}{part}.weight" for part in group)
            if stacked is not None and len({assignments[s].type for s in sources}) == 1:
                stacks.append((f"{layer}{stacked}.weight", sources))
            else:
                stacks.extend((source, (source,)) for source in sources)
    stacks.append(("model.norm.weight", ("model.norm.weight",)))
    if not config.tied:
        stacks.append((HEAD, (HEAD,)))
    return stacks


def _matrix(
    name: str, sources: tuple[str, ...], shapes: list[tuple[int, ...]], type_: QuantType, place: _Placer
) -> Matrix:
    """Place one stack: integers, then scales, then zero points."""
    source_rows, columns = tuple(shape[0] for shape in shapes), shapes[0][1]
    rows = sum(source_rows)
    if type_.bits == 0:
        weight = place.put(name, "float32", (rows, columns))
        return Matrix(name, sources, source_rows, columns, type_, weight)
    if not type_.holds(columns):
        raise RecipeError(
            f"{name}: a row of {columns} weights is no whole number of {type_.name} blocks "
            f"of {type_.block_size}"
        )
    blocks = columns // type_.block_size
    weight = place.put(name, "uint8", (rows, blocks, type_.block_size * type_.bits // 8))
    scales = place.put(name + ".scales", "float32", (rows, blocks))
    points = None
    if not type_.symmetric:
        points = place.put(name + ".zero_points", "uint8", (rows, -(-blocks * type_.bits // 8)))
    return Matrix(name, sources, source_rows, columns, type_, weight, scales, points)


class _Placer:
    """Hands out byte ranges one after the other."""

    def __init__(self) -> None:
        self.end = 0

    def put(self, name: str, dtype: str, shape: tuple[int, ...]) -> Range:
        """The next free range, aligned to a page when it is larger than a few pages, else to a cache line."""
        size = Range(name, dtype, shape, 0).nbytes
        step = PAGE_BYTES if size >= 4 * PAGE_BYTES else LINE_BYTES
        placed = Range(name, dtype, shape, -(-self.end // step) * step)
        self.end = placed.offset + size
        return placed
