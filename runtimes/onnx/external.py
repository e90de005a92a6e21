"""The gate for ONNX files from elsewhere: bounds what is parsed, refuses data outside the model's folder.

Every reader of an ONNX model passes through here before a runtime sees the file. Weights are never read:
those that lie inside the model file become byte ranges of it, as if it were its own data file. Knows protobuf
and byte ranges; not what any tensor means.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fox_edge.errors import ArtifactError, MissingPackageError

try:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
except ImportError:
    raise MissingPackageError("onnx", "onnx") from None

# The graph without its weights: the largest models of this family have some hundred kilobytes.
MAX_GRAPH_BYTES = 64 << 20
# What a protobuf message can be at most; larger models keep their weights beside the graph.
MAX_MODEL_BYTES = 2 << 30
# Initializers of at least so many bytes are weights; smaller ones are constants, read with the graph.
_WEIGHT_BYTES = 1024
# What any field of a message costs at least when it is counted: bounds the time that a walk takes.
_FIELD_BYTES = 64
# What the element types of stored tensors are in numpy.
ELEMENTS: dict[int, type[np.generic]] = {
    onnx.TensorProto.UINT8: np.uint8,
    onnx.TensorProto.INT8: np.int8,
    onnx.TensorProto.BOOL: np.bool_,
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.DOUBLE: np.float64,
    onnx.TensorProto.INT32: np.int32,
    onnx.TensorProto.INT64: np.int64,
}
_BITS = {number: 8 * np.dtype(kind).itemsize for number, kind in ELEMENTS.items()} | {
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.BFLOAT16: 16,
}
# Numbers of the fields that are walked into: a model's graph, a graph's initializers, a tensor's bytes.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
# Names of data files: whatever tools write, but no path, no drive, no control character.
_PLAIN_NAME = re.compile(r"[^/\\:\x00-\x1f\x7f]+")
# How a tensor may say where its data are.
_KEYS = {"location", "offset", "length", "checksum"}
# A stretch of the file, from its first byte to the one behind its last.
_Span = tuple[int, int]


def read_graph(path: Path) -> onnx.ModelProto:
    """Parse a model file without its weights, inside the file or beside it.

    A large initializer inside the file comes back as external data that names the model file itself. Raises
    ArtifactError when the file is too large or no ONNX model, or names data outside its own folder, or bytes
    that a data file does not have.
    """
    size = path.stat().st_size
    if size > MAX_MODEL_BYTES:
        raise ArtifactError(f"{path}: {size} bytes, but a model file has at most {MAX_MODEL_BYTES}")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            model = _Reader(path, data).model()
    except (DecodeError, ValueError):
        raise ArtifactError(f"{path}: {size} bytes that are no ONNX model") from None
    if not model.graph.node:
        raise ArtifactError(f"{path}: an ONNX model without a single operator")
    for tensor in _all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            External.of(tensor, path.parent)
    return model


class _Reader:
    """Walks the mapped file: copies out all but the weights. Raises ValueError for what is no message."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._left = path, data, MAX_GRAPH_BYTES

    def model(self) -> onnx.ModelProto:
        """The model; its large initializers say where in the file their bytes are."""
        rest, graphs = self._split((0, len(self._data)), _GRAPH)
        model = onnx.ModelProto.FromString(rest)
        for graph in graphs:
            rest, initializers = self._split(graph, _INITIALIZER)
            model.graph.MergeFromString(rest)
            model.graph.initializer.extend(self._tensor(at) for at in initializers)
        return model

    def _tensor(self, at: _Span) -> onnx.TensorProto:
        rest, raw = self._split(at, _RAW_DATA, _WEIGHT_BYTES)
        tensor = onnx.TensorProto.FromString(rest)
        if raw and tensor.data_location != onnx.TensorProto.EXTERNAL:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            start, end = raw[-1]
            for key, value in (("location", self._path.name), ("offset", start), ("length", end - start)):
                tensor.external_data.add(key=key, value=str(value))
        return tensor

    def _split(self, at: _Span, apart: int, least: int = 0) -> tuple[bytes, list[_Span]]:
        """One message without its fields of one number (of at least so many bytes), and where those are."""
        place, end = at
        kept: list[_Span] = []
        taken: list[_Span] = []
        begin = place
        while place < end:
            number, first, last = self._field(place, end)
            if number == apart and last - first >= least:
                self._spend(_FIELD_BYTES)
                kept.append((begin, place))
                taken.append((first, last))
                begin = last
            else:
                self._spend(max(_FIELD_BYTES, last - place))
            place = last
        kept.append((begin, end))
        return b"".join(self._data[start:stop] for start, stop in kept), taken

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ArtifactError(f"{self._path}: has more than {MAX_GRAPH_BYTES} bytes besides its weights")

    def _field(self, place: int, end: int) -> tuple[int, int, int]:
        """Number, first byte and end of the content of the field at this place."""
        key, first = self._varint(place, end)
        number, kind = key >> 3, key & 7
        if kind == 0:
            last = self._varint(first, end)[1]
        elif kind == 2:
            size, first = self._varint(first, end)
            last = first + size
        else:
            last = first + {1: 8, 5: 4}.get(kind, end)
        if not number or last > end:
            raise ValueError
        return number, first, last

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        """A number of seven bits a byte, and the place behind it."""
        value = 0
        for shift in range(0, 70, 7):
            if place >= end:
                break
            byte = self._data[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, place
        raise ValueError


def _all_tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere in a protobuf message: initializers, attributes, subgraphs, functions."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if isinstance(value, Iterable) else (value,):
                yield from _all_tensors(part)


@dataclass(frozen=True)
class External:
    """A checked byte range of a data file."""

    path: Path
    offset: int
    length: int

    @classmethod
    def of(cls, tensor: onnx.TensorProto, folder: Path) -> External:
        """Where a tensor's data are; raises ArtifactError unless the range is its size and in the folder."""
        keys = [entry.key for entry in tensor.external_data]
        # onnxruntime would also map what other keys name (packed copies of a matrix): unchecked bytes.
        if len(set(keys)) != len(keys) or not set(keys) <= _KEYS:
            raise ArtifactError(
                f"{folder}: tensor '{tensor.name}' says where its data are with {', '.join(sorted(keys))}"
            )
        fields = {entry.key: entry.value for entry in tensor.external_data}
        name = fields.get("location", "")
        path = folder / name
        if not _PLAIN_NAME.fullmatch(name) or path.resolve().parent != folder.resolve():
            raise ArtifactError(
                f"{folder}: tensor '{tensor.name}' names data in '{name}', which is no file of this folder"
            )
        if not path.is_file():
            raise ArtifactError(f"{path}: missing, but tensor '{tensor.name}' is in it")
        due = _nbytes(tensor, path)
        numbers = [fields.get("offset", "0"), fields.get("length", str(due))]
        if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in numbers):
            raise ArtifactError(f"{path}: tensor '{tensor.name}' has no offset and length")
        offset, length = (int(number) for number in numbers)
        size = path.stat().st_size
        if length != due or offset + length > size:
            raise ArtifactError(
                f"{path}: tensor '{tensor.name}' needs {due} bytes and names {length} from {offset} on, "
                f"but the file has {size}"
            )
        return cls(path, offset, length)


def _nbytes(tensor: onnx.TensorProto, where: Path) -> int:
    if tensor.data_type not in _BITS or any(dim < 0 for dim in tensor.dims):
        raise ArtifactError(
            f"{where}: tensor '{tensor.name}' has element type {tensor.data_type} "
            f"and shape {list(tensor.dims)}"
        )
    return -(-math.prod(tensor.dims) * _BITS[tensor.data_type] // 8)
