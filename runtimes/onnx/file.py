"""Look into an ONNX artifact without running it: its tensors, its tie, and what it tells about tokens.

Reads the graph as data and decodes the weights in plain numpy, independently of the exporter's code, so that
the two can disagree. Does not know the manifest: what a tensor is follows from the operator that reads it.
Another tool may have rewritten the file: its tie is told even where its tensors can no longer be.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fox_edge.artifact import Artifact
from fox_edge.config import FoxConfig
from fox_edge.errors import ArtifactError, VerificationError
from fox_edge.quant import EMBEDDING, HEAD
from runtimes.base import Logits
from runtimes.onnx.external import ELEMENTS, External, onnx, read_graph
from runtimes.onnx.tie import GraphIndex, find_tie
from runtimes.side_files import SideFiles

_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


@dataclass(frozen=True)
class _Stored:
    """Rows of one quantized or plain matrix, as one operator reads them. `bits` 0: plain floats."""

    weight: onnx.TensorProto
    scales: onnx.TensorProto | None
    zero_points: onnx.TensorProto | None
    bits: int
    rows: int
    columns: onnx.TensorProto | None = None  # factors (C,) by which the graph multiplies what columns give

    def tensors(self) -> list[onnx.TensorProto]:
        """Integers, scales, zero points, as far as there are any."""
        return [t for t in (self.weight, self.scales, self.zero_points) if t is not None]

    def type_name(self) -> str:
        """The name of its type in the quantization table; a float type has numpy's."""
        if self.scales is None:
            return np.dtype(ELEMENTS[self.weight.data_type]).name
        bits, block = self.block_type()
        return f"q{bits}{'s' if self.zero_points is None else 'a'}{block}"

    def block_type(self) -> tuple[int, int]:
        """Bits and block size of its integers; 0 and 0 for floats."""
        if self.scales is None:
            return 0, 0
        return self.bits, math.prod(self.weight.dims[1:]) * 8 // self.bits // self.scales.dims[1]

    def width(self) -> int:
        """Columns of a matrix, or the length of a vector."""
        dims = self.weight.dims[1:] if len(self.weight.dims) > 1 else self.weight.dims
        return math.prod(dims) if self.scales is None else math.prod(dims) * 8 // self.bits

    def row_bytes(self) -> int:
        """Bytes of one row, scales and zero points included."""
        return sum(_row_bytes(tensor) for tensor in self.tensors())


class StoredBlocks(NamedTuple):
    """Rows as MatMulNBits reads them: value = (integer - zero point) * scale, lowest bits of a byte first."""

    packed: NDArray[np.uint8]  # (n, C * bits / 8)
    scales: NDArray[Any]  # (n, B)
    zero_points: NDArray[np.uint8] | None  # (n, ceil(B * bits / 8)); None: 2^(bits - 1)
    bits: int


@dataclass(frozen=True)
class _Piece:
    """`rows` rows of a checkpoint tensor, which begin at `first` in a stored matrix."""

    stored: _Stored
    first: int
    rows: int


class OnnxFile:
    """An artifact's ONNX model as tensors; see `runtimes.base.ModelFile`."""

    def __init__(self, artifact: Artifact) -> None:
        self._path = artifact.model_path
        self._folder = artifact.path
        self._index = GraphIndex(read_graph(self._path).graph)
        self._graph = self._index.graph
        self._config = FoxConfig.read(artifact.path / "config.json")
        self._handles: dict[Path, int] = {}
        self._head: list[_Stored] = []
        self._embedding: _Stored | None = None
        self._pieces: dict[str, list[_Piece]] = {}
        self._unreadable: ArtifactError | None = None
        self._read_nodes()
        self._side_files = SideFiles(artifact.path)

    def tensor_names(self) -> list[str]:
        """Hugging Face names, as far as operators read them; a tied head is the embedding."""
        if self._unreadable is not None:
            raise self._unreadable
        return list(self._pieces)

    def stored(self, name: str) -> tuple[str, int]:
        """The type that a tensor has in the file, and its bytes."""
        pieces = self._pieces_of(name)
        kinds = {piece.stored.type_name() for piece in pieces}
        factors = {t.name: _row_bytes(t) for piece in pieces if (t := piece.stored.columns) is not None}
        size = sum(piece.rows * piece.stored.row_bytes() for piece in pieces) + sum(factors.values())
        return " and ".join(sorted(kinds)), size

    def rows(self, name: str, start: int, stop: int) -> Logits:
        """Dequantized rows [start, stop) of a tensor, float32; a vector is one row."""
        parts = self._parts(name, start, stop)
        return np.concatenate([self._decode(stored, low, high) for stored, low, high in parts])

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns; a vector is one row. Raises ArtifactError for parts of different widths."""
        pieces = self._pieces_of(name)
        widths = sorted({piece.stored.width() for piece in pieces})
        if len(widths) > 1:
            raise ArtifactError(f"{self._path}: parts of '{name}' have {widths[0]} and {widths[1]} columns")
        return sum(piece.rows for piece in pieces), widths[0]

    def block_types(self, name: str) -> set[tuple[int, int, bool]]:
        """Bits, block size and whether symmetric, of each matrix that holds some of a tensor's rows.

        Of floats, bits and block size are 0.
        """
        stored = [piece.stored for piece in self._pieces_of(name)]
        return {(*one.block_type(), one.zero_points is None) for one in stored}

    def blocks(self, name: str, start: int, stop: int) -> Iterator[StoredBlocks]:
        """Rows [start, stop) of a quantized tensor as they are stored, in order."""
        for stored, low, high in self._parts(name, start, stop):
            assert stored.scales is not None, f"{name} is not quantized"
            points = None if stored.zero_points is None else self._read(stored.zero_points, low, high)
            packed = self._read(stored.weight, low, high).reshape(high - low, -1)
            yield StoredBlocks(packed, self._read(stored.scales, low, high), points, stored.bits)

    def column_scales(self, name: str) -> Logits | None:
        """What the graph multiplies a quantized tensor's columns by (C,): in `rows`, but not in `blocks`."""
        found = [piece.stored for piece in self._pieces_of(name) if piece.stored.scales is not None]
        factors = next((stored.columns for stored in found if stored.columns is not None), None)
        return None if factors is None else self._read(factors, 0, 1)[0].astype(np.float32)

    def _parts(self, name: str, start: int, stop: int) -> Iterator[tuple[_Stored, int, int]]:
        """The stored matrices that hold a tensor's rows [start, stop), each with its own range of them."""
        begin = 0
        for piece in self._pieces_of(name):
            low, high = max(start, begin), min(stop, begin + piece.rows)
            if low < high:
                shift = piece.first - begin
                yield piece.stored, low + shift, high + shift
            begin += piece.rows

    def tie(self) -> str:
        """What proves that embedding and head are one byte range; else raises VerificationError."""
        tie = find_tie(self._index, self._folder)
        if not tie.one_copy or tie.is_copied_at_load:
            raise VerificationError(f"{self._path}: {tie.sentence()}")
        if self._embedding is None or not self._head:
            raise self._unreadable or VerificationError(f"{self._path}: embedding or head is unreadable")
        kinds = {(len(stored.tensors()), stored.bits) for stored in (self._embedding, *self._head)}
        if len(kinds) > 1:
            raise VerificationError(f"{self._path}: embedding and head are of different types")
        if len({stored.columns and stored.columns.name for stored in (self._embedding, *self._head)}) > 1:
            raise VerificationError(f"{self._path}: embedding and head have different column scales")
        for place, tensor in enumerate(self._embedding.tensors()):
            self._same_bytes(tensor, [stored.tensors()[place] for stored in self._head])
        return self._once()

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids by the artifact's own tokenizer files, without <bos>."""
        return self._side_files.tokenize(text, special)

    def special_ids(self) -> dict[str, int | None]:
        """What config.json tells a runtime; <unk> is the tokenizer's own business."""
        return self._side_files.special_ids()

    def chat_template(self) -> str | None:
        """The chat template beside the model."""
        return self._side_files.chat_template()

    def close(self) -> None:
        """Close the data files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _pieces_of(self, name: str) -> list[_Piece]:
        if name not in self._pieces:
            raise self._unreadable or ArtifactError(f"{self._path}: holds no tensor '{name}'")
        return self._pieces[name]

    def _read_nodes(self) -> None:
        """Note the weights of every operator; the first one unreadable is told when tensors are asked for."""
        embedding, heads = self._index.embedding(), self._index.heads()
        lookup = embedding.node.output[0] if embedding else None
        products = {head.node.output[0] for head in heads}
        for node in self._graph.node:
            try:
                if node.output[0] == lookup:
                    self._read_embedding(node)
                else:
                    self._read_node(node, node.output[0] in products)
            except ArtifactError as error:
                self._unreadable = self._unreadable or error

    def _read_embedding(self, node: onnx.NodeProto) -> None:
        bits = 0 if node.op_type == "Gather" else _attribute(node, "bits", 4)
        names = [node.input[0], *node.input[2:]]  # input 1: the token ids
        scale = next((n for n in self._graph.node if n.op_type == "Mul" and node.output[0] in n.input), None)
        self._embedding = replace(self._stored(names, bits), columns=self._column_scales(scale))
        self._pieces[EMBEDDING] = [_Piece(self._embedding, 0, self._embedding.rows)]

    def _read_node(self, node: onnx.NodeProto, is_head: bool) -> None:
        """Note the weights that an operator reads, under the names of the checkpoint."""
        if node.op_type in ("MatMulNBits", "FusedMatMul"):
            bits = _attribute(node, "bits", 4) if node.op_type == "MatMulNBits" else 0
            stored = self._stored(node.input[1:], bits)
            if is_head:
                scale = self._index.makers.get(node.input[0])
                self._add_head(replace(stored, columns=self._column_scales(scale)))
            else:
                self._add_matrix(node.name, stored)
        elif node.op_type in _NORMS:
            weight = self._initializer(node.input[-1])
            self._pieces[f"{node.name}.weight"] = [_Piece(_Stored(weight, None, None, 0, 1), 0, 1)]

    def _initializer(self, name: str) -> onnx.TensorProto:
        if name in self._index.initializers:
            return self._index.initializers[name]
        maker = self._index.makers.get(name)
        if maker is None:
            raise ArtifactError(
                f"{self._path}: no initializer '{name}' among {len(self._index.initializers)}"
            )
        raise ArtifactError(
            f"{self._path}: '{name}' is no initializer but made by the operator {maker.op_type}: "
            "another tool has rewritten this graph, and its tensors cannot be told any more"
        )

    def _stored(self, names: Any, bits: int) -> _Stored:
        """The matrix made of these initializers: integers, scales, perhaps zero points."""
        weight, scales, zeros = [self._initializer(n) for n in names] + [None] * (3 - len(names))
        return _Stored(weight, scales, zeros, bits, weight.dims[0])

    def _column_scales(self, node: onnx.NodeProto | None) -> onnx.TensorProto | None:
        """The vector that an operator multiplies by; None for another operator, or none at all."""
        if node is None or node.op_type != "Mul":
            return None
        constants = [
            self._index.initializers[name] for name in node.input if name in self._index.initializers
        ]
        return constants[0] if len(constants) == 1 and len(constants[0].dims) == 1 else None

    def _add_head(self, stored: _Stored) -> None:
        """A slice of the head; tied, its rows are the embedding's and `tie` proves it."""
        self._head.append(stored)
        if not self._config.tied:
            self._pieces.setdefault(HEAD, []).append(_Piece(stored, 0, stored.rows))

    def _add_matrix(self, name: str, stored: _Stored) -> None:
        """One projection, or several stacked."""
        layer, _, last = name.rpartition(".")
        c = self._config
        queries = c.num_heads * c.head_dim
        stacks = {
            "qkv_proj": {"q_proj": queries, "k_proj": c.kv_dim, "v_proj": c.kv_dim},
            "gate_up_proj": {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size},
        }
        parts = stacks.get(last, {last: stored.rows})
        if sum(parts.values()) != stored.rows:
            raise ArtifactError(f"{self._path}: '{name}' has {stored.rows} rows, but {parts} are due")
        first = 0
        for part, rows in parts.items():
            self._pieces[f"{layer}.{part}.weight"] = [_Piece(stored, first, rows)]
            first += rows

    def _read(self, tensor: onnx.TensorProto, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of an initializer, as stored; (1, n) for a vector. Copies only those."""
        kind = np.dtype(ELEMENTS[tensor.data_type])
        dims = list(tensor.dims) if len(tensor.dims) > 1 else [1, *tensor.dims]
        row = _row_bytes(tensor)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor).reshape(dims)[start:stop]
        at = External.of(tensor, self._folder)
        if at.path not in self._handles:
            self._handles[at.path] = os.open(at.path, os.O_RDONLY)
        data = os.pread(self._handles[at.path], (stop - start) * row, at.offset + start * row)
        return np.frombuffer(data, kind).reshape(stop - start, *dims[1:])

    def _decode(self, stored: _Stored, start: int, stop: int) -> Logits:
        """(integer - zero point) * scale, or the floats themselves; (rows, columns)."""
        weight = self._read(stored.weight, start, stop)
        if stored.scales is None:
            return weight.astype(np.float32)
        scales = self._read(stored.scales, start, stop)
        rows, blocks = scales.shape
        integers = _unpack(weight.reshape(rows, -1), stored.bits).reshape(rows, blocks, -1)
        zeros = np.full((rows, blocks), 1 << (stored.bits - 1), np.float32)
        if stored.zero_points is not None:
            zeros[:] = _unpack(self._read(stored.zero_points, start, stop), stored.bits)[:, :blocks]
        values = ((integers.astype(np.float32) - zeros[:, :, None]) * scales[:, :, None]).reshape(rows, -1)
        return values if stored.columns is None else values * self._read(stored.columns, 0, 1)

    def _same_bytes(self, one: onnx.TensorProto, parts: list[onnx.TensorProto]) -> None:
        """The parts follow each other through exactly the byte range of the one."""
        if [p.name for p in parts] == [one.name]:
            return
        if any(t.data_location != onnx.TensorProto.EXTERNAL for t in (one, *parts)):
            raise VerificationError(
                f"{self._path}: '{one.name}' and the head's '{parts[0].name}' are two copies"
            )
        whole = External.of(one, self._folder)
        at = whole.offset
        for part in parts:
            found = External.of(part, self._folder)
            if (found.path, found.offset) != (whole.path, at):
                raise VerificationError(
                    f"{self._path}: embedding and head are two copies: '{part.name}' is at byte "
                    f"{found.offset} of {found.path.name}, but {at} of {whole.path.name} is due"
                )
            at += found.length
        if at != whole.offset + whole.length:
            raise VerificationError(
                f"{self._path}: the head has {at - whole.offset} bytes of the embedding's {whole.length}"
            )

    def _once(self) -> str:
        """The size of the data file leaves no room for a second copy."""
        assert self._embedding is not None
        if self._embedding.weight.data_location != onnx.TensorProto.EXTERNAL:
            return f"embedding and head are one initializer, '{self._embedding.weight.name}'"
        tied = External.of(self._embedding.weight, self._folder)
        ranges = {
            at
            for t in self._graph.initializer
            if t.data_location == onnx.TensorProto.EXTERNAL
            and (at := External.of(t, self._folder)).path == tied.path
        }
        used, end = 0, 0
        for at in sorted(ranges, key=lambda r: (r.offset, -r.length)):
            used += max(0, at.offset + at.length - max(at.offset, end))
            end = max(end, at.offset + at.length)
        size = tied.path.stat().st_size
        if size - used >= tied.length:
            raise VerificationError(
                f"{tied.path}: {size - used} of its {size} bytes belong to no tensor: room for a second copy"
            )
        return (
            f"embedding and head read the same {tied.length} bytes of {tied.path.name}, from {tied.offset} "
            f"on; the file's {size} bytes hold them once"
        )


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _row_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of one row of a matrix, or of a whole vector."""
    columns = tensor.dims[1:] if len(tensor.dims) > 1 else tensor.dims
    return math.prod(columns) * np.dtype(ELEMENTS[tensor.data_type]).itemsize


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(rows, bytes) -> (rows, bytes * 8 / bits): the lowest bits of a byte come first."""
    per_byte = 8 // bits
    integers = np.empty((packed.shape[0], packed.shape[1] * per_byte), np.uint8)
    for place in range(per_byte):
        integers[:, place::per_byte] = (packed >> (bits * place)) & ((1 << bits) - 1)
    return integers
