"""The GGUF container: header, metadata, the table of tensors, and llama.cpp's names for a Fox's tensors.

Read here bounds first, so that a damaged or hostile file ends in one sentence before any library sees it.
Knows the container, which models and importance matrices share; not what their metadata means.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.errors import ArtifactError, MissingPackageError
from fox_edge.quant import EMBEDDING, HEAD

try:
    import gguf
except ImportError:
    raise MissingPackageError("gguf", "gguf") from None

MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 12
MAX_NAME_BYTES = 1 << 16
MAX_STRING_BYTES = 16 << 20
MAX_HEADER_BYTES = 256 << 20
# In all arrays: four times the largest vocabulary in use. Each is walked over in Python.
MAX_TEXTS = 1 << 20
MAX_DIMENSIONS = 4

# GGUF value type -> struct code; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
TYPE_WORDS = {4: "uint32", 5: "int32", 6: "float32", 7: "bool", 8: "text", 9: "array"}

# Before every text: its bytes.
_LENGTH = struct.Struct("<Q")

_FIXED_NAMES = {
    EMBEDDING: "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def stored_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    if name in _FIXED_NAMES:
        return _FIXED_NAMES[name]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if found is None or found[2] not in _LAYER_NAMES:
        raise ValueError(f"{name}: no tensor of the llama architecture")
    return f"blk.{found[1]}.{_LAYER_NAMES[found[2]]}.weight"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` is (rows, columns) or (columns,), `offset` counts from the file's first byte."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class ArrayInfo:
    """An array among the metadata: element type, length, and where in the file the elements start."""

    type: int
    length: int
    start: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Header:
    """Everything before the weights.

    `metadata` holds scalars, strings and, for arrays, an ArrayInfo; `kinds` the GGUF type of each value.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)


class _Cursor:
    """Reads forward through a mapped file; a read past the end or the limit is an ArtifactError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.texts = 0

    def error(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: damaged GGUF header at byte {self.at}: {what}")

    def skip(self, size: int) -> int:
        """Step over `size` bytes; returns where they start."""
        if size > self.end - self.at:
            raise self.error(f"{size} bytes are due, but the file has {len(self.data)}")
        start, self.at = self.at, self.at + size
        return start

    def number(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, self.data, self.skip(size))[0]

    def count(self, what: str, limit: int, code: str = "Q") -> int:
        """A number of things that follow; refused above `limit`."""
        value = int(self.number(code))
        if value > limit:
            raise self.error(f"{value} {what}, but at most {limit} are read")
        return value

    def string(self, limit: int) -> str:
        size = self.count("bytes of text", limit)
        start = self.skip(size)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise self.error("a text is not UTF-8") from None

    def name(self) -> str:
        """A key or a tensor's name, short and printable, so that a sentence can quote it."""
        name = self.string(MAX_NAME_BYTES)
        if not name.isprintable():
            raise self.error(f"{name[:40]!r} is no name")
        return name

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == STRING:
            return self.string(MAX_STRING_BYTES)
        if kind == ARRAY:
            return self._array()
        raise self.error(f"unknown value type {kind}")

    def _array(self) -> ArrayInfo:
        kind, length = int(self.number("I")), int(self.number("Q"))
        start = self.at
        if kind in _SCALARS:
            self.skip(length * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == STRING:
            self.texts += length
            if self.texts > min(MAX_TEXTS, (self.end - self.at) // 8):
                raise self.error(
                    f"an array of {length} texts, but the file has {len(self.data)} bytes, and at most "
                    f"{MAX_TEXTS} texts are read"
                )
            self._skip_texts(length)
        else:
            raise self.error(f"an array of value type {kind}")
        return ArrayInfo(kind, length, start)

    def _skip_texts(self, count: int) -> None:
        """Step over so many texts: `count` and `skip` in one loop, as a vocabulary has 256,000."""
        size_at, data, end, at = _LENGTH.unpack_from, self.data, self.end - 8, self.at
        for _ in range(count):
            size = size_at(data, at)[0] if at <= end else 0
            self.at, at = at, at + 8 + size
            if size > MAX_STRING_BYTES or at > end + 8:
                raise self.error(f"{size} bytes of text are due, but the file has {len(self.data)}")
        self.at = at


def read_header(path: Path) -> Header:
    """Read and check everything before the weights, and that the file holds all of them.

    Raises ArtifactError naming the file and the number that is wrong.
    """
    with open_mapped(path) as data:
        return parse_header(path, data)


def open_mapped(path: Path) -> mmap.mmap:
    """Map a file for reading; raises ArtifactError."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except ValueError:
        raise ArtifactError(f"{path}: an empty file, but a GGUF file is due") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None


def parse_header(path: Path, data: mmap.mmap) -> Header:
    """`read_header` of a mapped file."""
    cursor = _Cursor(path, data)
    if data[:4] != b"GGUF":
        raise ArtifactError(f"{path}: not a GGUF file (it starts with {data[:4]!r})")
    cursor.skip(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise ArtifactError(f"{path}: GGUF version {version}, but 2 and 3 are read")
    tensor_count = cursor.count("tensors", MAX_TENSORS)
    key_count = cursor.count("keys", MAX_KEYS)
    metadata: dict[str, Any] = {}
    kinds: dict[str, int] = {}
    for _ in range(key_count):
        key = cursor.name()
        if key in metadata:
            raise cursor.error(f"the key '{key}' appears twice")
        kinds[key] = int(cursor.number("I"))
        metadata[key] = cursor.value(kinds[key])
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.error(f"alignment {alignment!r} is no power of two from 8")
    found = [_tensor_info(cursor) for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    return Header(metadata, _place(path, found, start, alignment, len(data)), kinds)


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    """One entry of the tensor table; its offset still counts from the first tensor."""
    name = cursor.name()
    dimensions = cursor.count(f"dimensions of {name}", MAX_DIMENSIONS, "I")
    shape = tuple(int(cursor.number("Q")) for _ in range(dimensions))[::-1]
    number, offset = int(cursor.number("I")), int(cursor.number("Q"))
    try:
        kind = gguf.GGMLQuantizationType(number)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise cursor.error(f"tensor {name} has the unknown type {number}") from None
    if not shape or any(n < 1 for n in shape) or shape[-1] % block_size:
        raise cursor.error(f"tensor {name} of shape {list(shape)} is no whole number of {kind.name} blocks")
    size = math.prod(shape) // block_size * block_bytes
    return TensorInfo(name, kind.name.lower(), shape, offset, size)


def _place(
    path: Path, found: list[TensorInfo], start: int, alignment: int, file_bytes: int
) -> dict[str, TensorInfo]:
    """The tensors by name, offsets from the file's start, none beyond its end, none upon another."""
    tensors: dict[str, TensorInfo] = {}
    end, before = 0, ""
    for info in sorted(found, key=lambda t: t.offset):
        if info.name in tensors:
            raise ArtifactError(f"{path}: tensor {info.name} appears twice")
        if info.offset < end:
            raise ArtifactError(f"{path}: tensors {before} and {info.name} overlap at byte {info.offset}")
        if info.offset % alignment:
            raise ArtifactError(
                f"{path}: tensor {info.name} starts at byte {info.offset}, no multiple of {alignment}"
            )
        end, before = info.offset + info.bytes, info.name
        if start + end > file_bytes:
            raise ArtifactError(
                f"{path}: cut short: tensor {info.name} ends at byte {start + end}, "
                f"but the file has {file_bytes}"
            )
        tensors[info.name] = TensorInfo(info.name, info.type, info.shape, start + info.offset, info.bytes)
    return tensors


def array_texts(data: mmap.mmap, info: ArrayInfo) -> Iterator[bytes]:
    """The elements of an array of strings that `parse_header` has walked through."""
    size_at, at = _LENGTH.unpack_from, info.start
    for _ in range(info.length):
        size = size_at(data, at)[0]
        yield data[at + 8 : at + 8 + size]
        at += 8 + size


def array_numbers(data: mmap.mmap, info: ArrayInfo) -> NDArray[Any]:
    """The elements of an array of numbers, copied: a view would keep the mapping from being closed."""
    code = "?" if info.type == BOOL else _SCALARS[info.type]
    return np.frombuffer(data, np.dtype(code).newbyteorder("<"), info.length, info.start).copy()
