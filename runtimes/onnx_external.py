"""The gate for ONNX files from elsewhere: bounds what is parsed, refuses data outside the artifact's folder.

Every reader of an ONNX artifact passes through here before a runtime sees the file. Knows protobuf and byte
ranges; not what any tensor means.
"""

from __future__ import annotations

import math
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

# A graph of the largest models of this family has some hundred kilobytes.
MAX_GRAPH_BYTES = 64 << 20
# What the element types of stored tensors are in numpy.
ELEMENTS: dict[int, type[np.generic]] = {
    onnx.TensorProto.UINT8: np.uint8,
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.INT64: np.int64,
}


def read_graph(path: Path) -> onnx.ModelProto:
    """Parse a model file without its external data.

    Raises ArtifactError when it is too large or no ONNX model, or names data outside its own folder, or bytes
    that a data file does not have.
    """
    size = path.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise ArtifactError(f"{path}: {size} bytes, but a graph has at most {MAX_GRAPH_BYTES}")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise ArtifactError(f"{path}: {size} bytes that are no ONNX model") from None
    if not model.graph.node:
        raise ArtifactError(f"{path}: an ONNX model without a single operator")
    for tensor in _all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            External.of(tensor, path.parent)
    return model


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
        fields = {entry.key: entry.value for entry in tensor.external_data}
        name = fields.get("location", "")
        path = folder / name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or (
            path.resolve().parent != folder.resolve()
        ):
            raise ArtifactError(
                f"{folder}: tensor '{tensor.name}' names data in '{name}', which is no file of this folder"
            )
        if not path.is_file():
            raise ArtifactError(f"{path}: missing, but tensor '{tensor.name}' is in it")
        numbers = [fields.get("offset", "0"), fields.get("length", "")]
        if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in numbers):
            raise ArtifactError(f"{path}: tensor '{tensor.name}' has no offset and length")
        offset, length = (int(number) for number in numbers)
        size, due = path.stat().st_size, _nbytes(tensor, path)
        if length != due or offset + length > size:
            raise ArtifactError(
                f"{path}: tensor '{tensor.name}' needs {due} bytes and names {length} from {offset} on, "
                f"but the file has {size}"
            )
        return cls(path, offset, length)


def _nbytes(tensor: onnx.TensorProto, where: Path) -> int:
    if tensor.data_type not in ELEMENTS or any(dim < 0 for dim in tensor.dims):
        raise ArtifactError(
            f"{where}: tensor '{tensor.name}' has element type {tensor.data_type} "
            f"and shape {list(tensor.dims)}"
        )
    return math.prod(tensor.dims) * np.dtype(ELEMENTS[tensor.data_type]).itemsize
