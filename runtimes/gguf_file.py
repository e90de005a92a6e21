"""What is in a GGUF file: header, tensors, tie, vocabulary, read without running the model.

The header is read here, bounds first, so that a damaged or hostile file ends in one sentence before any
library sees it; dequantization is gguf-py's numpy, written independently of the C that quantized.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.artifact import Artifact
from fox_edge.config import FoxConfig
from fox_edge.errors import ArtifactError, CheckpointError, MissingPackageError, VerificationError
from fox_edge.quant import EMBEDDING

try:
    import gguf
except ImportError:
    raise MissingPackageError("gguf", "gguf") from None

MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 12
MAX_NAME_BYTES = 1 << 16
MAX_STRING_BYTES = 16 << 20
MAX_HEADER_BYTES = 256 << 20
MAX_DIMENSIONS = 4
# Weights that one step dequantizes: gguf-py's numpy makes several temporaries of this many float32.
_STEP_WEIGHTS = 1 << 20

# GGUF value type -> struct code; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_ROTATED = ("attn_q.weight", "attn_k.weight")
_IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
}


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
    """An array among the metadata: its element type and length; the elements are not kept."""

    type: int
    length: int


@dataclass(frozen=True)
class Header:
    """Everything before the weights. `metadata` holds scalars, strings and, for arrays, an ArrayInfo."""

    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)


class _Cursor:
    """Reads forward through a mapped file; a read past the end or the limit is an ArtifactError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0
        self.end = min(len(data), MAX_HEADER_BYTES)

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

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string(MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self._array()
        raise self.error(f"unknown value type {kind}")

    def _array(self) -> ArrayInfo:
        kind, length = int(self.number("I")), int(self.number("Q"))
        if kind in _SCALARS:
            self.skip(length * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            if length > (self.end - self.at) // 8:
                raise self.error(f"an array of {length} texts, but the file has {len(self.data)} bytes")
            for _ in range(length):
                self.skip(self.count("bytes of text", MAX_STRING_BYTES))
        else:
            raise self.error(f"an array of value type {kind}")
        return ArrayInfo(kind, length)


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
        raise ArtifactError(f"{path}: an empty file, but a GGUF model is due") from None
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
    for _ in range(key_count):
        key = cursor.string(MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.error(f"the key '{key}' appears twice")
        metadata[key] = cursor.value(int(cursor.number("I")))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.error(f"alignment {alignment!r} is no power of two from 8")
    found = [_tensor_info(cursor) for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    return Header(metadata, _place(path, found, start, alignment, len(data)))


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    """One entry of the tensor table; its offset still counts from the first tensor."""
    name = cursor.string(MAX_NAME_BYTES)
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


# FoxConfig's field -> its key among the metadata.
_SHAPE_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_positions": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


def read_config(path: Path) -> FoxConfig:
    """The model's dimensions, checked: llama.cpp ends the whole process over some that it cannot believe.

    Raises ArtifactError naming the file and the number.
    """
    header = read_header(path)
    if header.metadata.get("general.architecture") != "llama":
        raise ArtifactError(
            f"{path}: architecture {header.metadata.get('general.architecture')!r}, not llama"
        )
    pieces = header.metadata.get("tokenizer.ggml.tokens")
    fields = {field: header.metadata.get(f"llama.{key}") for field, key in _SHAPE_KEYS.items()}
    missing = [key for field, key in _SHAPE_KEYS.items() if not isinstance(fields[field], int | float)]
    if missing or not isinstance(pieces, ArrayInfo):
        raise ArtifactError(f"{path}: has no {'llama.' + missing[0] if missing else 'tokenizer.ggml.tokens'}")
    try:
        config = FoxConfig(
            vocab_size=pieces.length,
            tied="output.weight" not in header.tensors,
            **fields,  # type: ignore[arg-type]
        )
    except CheckpointError as error:
        raise ArtifactError(f"{path}: {str(error).removeprefix('config.json: ')}") from None
    layers = sum(name.endswith(".attn_norm.weight") for name in header.tensors)
    if layers != config.num_layers:
        raise ArtifactError(f"{path}: {config.num_layers} layers, but the weights of {layers}")
    return config


class GgufFile:
    """A ModelFile over the GGUF file of an artifact, whose manifest says which tensor is which."""

    def __init__(self, artifact: Artifact) -> None:
        self._path = artifact.model_path
        self._data: mmap.mmap | None = open_mapped(self._path)
        self._header = parse_header(self._path, self._data)
        self._stored = {t.name: t.stored_as for t in artifact.manifest.tensors}
        self._vocabulary: Any = None
        strangers = sorted(set(self._header.tensors) - set(self._stored.values()))
        if strangers:
            raise ArtifactError(
                f"{self._path}: tensor {strangers[0]} is in the file, but not in the manifest"
            )

    def tensor_names(self) -> list[str]:
        """Hugging Face names of the tensors that are in the file."""
        return [name for name, stored in self._stored.items() if stored in self._header.tensors]

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor by its Hugging Face name; raises ArtifactError."""
        info = self._header.tensors.get(self._stored.get(name, ""))
        if info is None:
            raise ArtifactError(f"{self._path}: has no tensor for {name}")
        return info

    def stored(self, name: str) -> tuple[str, int]:
        """The type that a tensor has in the file, and its bytes."""
        info = self.info(name)
        return info.type, info.bytes

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Dequantized rows [start, stop), float32, in the checkpoint's own row order; a vector is one row."""
        info = self.info(name)
        columns = info.shape[-1]
        count = math.prod(info.shape[:-1])
        if not 0 <= start <= stop <= count:
            raise ValueError(f"{name}: rows {start} to {stop} of {count}")
        order = self._row_order(info, start, stop)
        out = np.empty((stop - start, columns), dtype=np.float32)
        step = max(1, _STEP_WEIGHTS // columns)
        for at in range(0, stop - start, step):
            out[at : at + step] = self._dequantize(info, order[at : at + step])
        return out

    def _row_order(self, info: TensorInfo, start: int, stop: int) -> NDArray[np.int64]:
        """Where in the file the checkpoint's rows [start, stop) are.

        llama.cpp's rope pairs rows 2i and 2i + 1 of a head, the checkpoint's i and i + D/2.
        """
        rows = np.arange(start, stop)
        if not info.name.endswith(_ROTATED):
            return rows
        size = self._head_rows(info)
        head, within = rows // size, rows % size
        return head * size + within % (size // 2) * 2 + within // (size // 2)

    def _head_rows(self, info: TensorInfo) -> int:
        key = "head_count_kv" if info.name.endswith("attn_k.weight") else "head_count"
        heads = self._header.metadata.get(f"llama.attention.{key}")
        if not isinstance(heads, int) or heads < 1 or info.shape[0] % (2 * heads):
            raise ArtifactError(f"{self._path}: {info.name} has {info.shape[0]} rows for {heads!r} heads")
        return info.shape[0] // heads

    def _dequantize(self, info: TensorInfo, order: NDArray[np.int64]) -> NDArray[np.float32]:
        if self._data is None:
            raise ArtifactError(f"{self._path}: is closed")
        kind = gguf.GGMLQuantizationType[info.type.upper()]
        stored = np.frombuffer(self._data, np.uint8, info.bytes, info.offset)
        blocks = stored.reshape(math.prod(info.shape[:-1]), -1)[order]
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            return blocks.view("<f4" if info.type == "f32" else "<f2").astype(np.float32)
        return np.asarray(gguf.quants.dequantize(blocks, kind), dtype=np.float32)

    def tie(self) -> str:
        """One sentence proving that one byte range is both embedding and head; raises VerificationError."""
        heads = [name for name in self._header.tensors if name.startswith("output.")]
        if heads:
            raise VerificationError(f"{self._path.name}: holds {heads[0]} besides the embedding")
        info = self.info(EMBEDDING)
        return (
            f"{self._path.name} has no output.weight, so {info.name} ({info.type}, bytes {info.offset} to "
            f"{info.offset + info.bytes}) is embedding and head, one matrix"
        )

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids as llama.cpp makes them, without <bos>."""
        if self._vocabulary is None:
            from runtimes.llama_cpp import Vocabulary

            self._vocabulary = Vocabulary(self._path)
        ids: list[int] = self._vocabulary.tokenize(text, special)
        return ids

    def special_ids(self) -> dict[str, int | None]:
        """The ids that the metadata gives to bos, eos, pad and unk."""
        values = {role: self._header.metadata.get(key) for role, key in _IDS.items()}
        return {role: value if isinstance(value, int) else None for role, value in values.items()}

    def chat_template(self) -> str | None:
        """The Jinja text in the metadata."""
        template = self._header.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def close(self) -> None:
        """Let go of the file and of llama.cpp's vocabulary."""
        if self._vocabulary is not None:
            self._vocabulary.close()
            self._vocabulary = None
        if self._data is not None:
            data, self._data = self._data, None
            data.close()
