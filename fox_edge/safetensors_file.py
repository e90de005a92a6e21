"""One safetensors file, read through a memory map or written tensor by tensor.

Every number in a header is checked before anything is mapped or allocated: a hostile file gets one
sentence. Knows the format (8 bytes of header length, a JSON header, the tensors' bytes), not which
tensors a model needs. Format: the safetensors project's README, "Format".
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fox_edge.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMENSIONS = 8
_PREFIX_BYTES = 8
# Advice that not every system takes.
_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)

# The float types a checkpoint may have, by the format's names.
FLOATS: dict[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}
# Bits per element of every type the format knows; the others may appear in tensors that nobody reads.
_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4},
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes [start, stop) of its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A validated, memory-mapped file. Tensors are views on the map; `release` gives their pages back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.tensors = _read_header(path, file.read, size)
                # A private map: torch needs a writable buffer, and no write can reach the file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None

    def tensor(self, name: str) -> Tensor:
        """A view on the mapped file, in the stored type; only the FLOATS can be read. Do not write to it."""
        info = self.tensors[name]
        dtype = FLOATS[info.dtype]
        if info.start == info.stop:
            return torch.empty(info.shape, dtype=dtype)
        if info.start % dtype.itemsize:  # legal but odd; no view can start there
            raw: Any = bytearray(self._map[info.start : info.stop])
            return torch.frombuffer(raw, dtype=dtype).view(info.shape)
        count = math.prod(info.shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=info.start).view(info.shape)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of bytes [start, stop) of a tensor back; they are read again on demand."""
        if _DONTNEED is None:
            return
        info = self.tensors[name]
        first = info.start + start
        last = info.stop if stop is None else min(info.start + stop, info.stop)
        first -= first % mmap.PAGESIZE
        if last > first:
            self._map.madvise(_DONTNEED, first, last - first)


def _read_header(path: Path, read: Any, size: int) -> dict[str, TensorInfo]:
    """Parse and check the header of a file of `size` bytes; `read(n)` gives its next bytes."""
    if size < _PREFIX_BYTES:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
    prefix = read(_PREFIX_BYTES)
    (length,) = struct.unpack("<Q", prefix)
    if prefix.startswith(b"GGUF"):
        raise CheckpointError(f"{path}: a GGUF file under a safetensors name")
    if length > MAX_HEADER_BYTES or length > size - _PREFIX_BYTES:
        raise CheckpointError(
            f"{path}: the header claims {length} bytes, but the file has {size} "
            f"and a header at most {MAX_HEADER_BYTES}"
        )
    try:
        header = json.loads(read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not readable as JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header holds no JSON object")
    header.pop("__metadata__", None)
    base = _PREFIX_BYTES + length
    tensors = {name: _tensor_info(path, name, entry, base) for name, entry in header.items()}
    _check_layout(path, tensors, base, size)
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"'{twice}' appears twice")
    return found


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{path}: tensor '{name}' has the unknown type {dtype!r}")
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{path}: tensor '{name}' has the impossible shape {str(shape)[:80]}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: tensor '{name}' has the impossible offsets {str(offsets)[:80]}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{path}: tensor '{name}' of shape {list(shape)} in {dtype} takes {-(-bits // 8)} bytes, "
            f"but the header gives it {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether this is a list of integers from 0, none absurd."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], base: int, size: int) -> None:
    """The tensors must follow each other without gap or overlap up to the end of the file."""
    end = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor '{name}' at byte {info.start} {what}, which ends at {end}")
        end = info.stop
    if end != size:
        what = "truncated" if size < end else "longer than its tensors"
        raise CheckpointError(f"{path}: {what}: its header describes {end} bytes, the file has {size}")


class SafetensorsWriter:
    """Writes a file whose tensors' names and shapes are known beforehand, a few rows at a time.

    A context manager; leaving it normally before every tensor is complete raises CheckpointError.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.path, self.dtype = path, dtype
        self._shapes = dict(shapes)
        self._next = dict.fromkeys(shapes, 0)  # name -> elements written so far
        header, self._starts = _layout(self._shapes, dtype)
        self._file = path.open("wb")
        self._file.write(header)

    def write_rows(self, name: str, rows: Tensor) -> None:
        """Append rows to a tensor (a vector counts as one row); tensors may be written in any order.

        Raises CheckpointError for an unknown name, a wrong width, or more rows than announced.
        """
        shape = self._shapes.get(name)
        if shape is None:
            raise CheckpointError(f"{self.path}: tensor '{name}' was not announced")
        done, total = self._next[name], math.prod(shape)
        if rows.shape[1:] != shape[1:] or done + rows.numel() > total:
            raise CheckpointError(
                f"{self.path}: tensor '{name}' of shape {list(shape)} cannot take {list(rows.shape)} "
                f"after {done} of {total} weights"
            )
        raw = rows.detach().to(device="cpu", dtype=self.dtype).contiguous().reshape(-1)
        self._file.seek(self._starts[name] + done * self.dtype.itemsize)
        self._file.write(raw.view(torch.uint8).numpy().data)
        self._next[name] = done + rows.numel()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            for name, shape in self._shapes.items():
                if self._next[name] != math.prod(shape):
                    raise CheckpointError(
                        f"{self.path}: tensor '{name}' got {self._next[name]} of {math.prod(shape)} weights"
                    )


def _layout(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor starts; the data begins at a multiple of 64 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _FLOAT_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_PREFIX_BYTES + len(text)) % 64)
    base = _PREFIX_BYTES + len(text)
    starts = {name: base + entries[name]["data_offsets"][0] for name in shapes}
    return struct.pack("<Q", len(text)) + text, starts
