"""llama.cpp's importance matrices, read and written: which columns of a matrix the model really uses.

Knows the two formats (GGUF, and the older .dat, which is only read) and how their entries are named; not how
importance is computed from text, nor how a quantizer uses it.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.config import FoxConfig
from fox_edge.errors import ArtifactError, FoxEdgeError, MissingPackageError
from fox_edge.gguf_format import (
    STRING,
    ArrayInfo,
    Header,
    TensorInfo,
    array_texts,
    open_mapped,
    parse_header,
    stored_name,
)
from fox_edge.partial import partial_files
from fox_edge.quant import EMBEDDING, HEAD

try:
    import gguf
except ImportError:
    raise MissingPackageError("gguf", "gguf") from None

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
# Ours, which llama.cpp passes over.
_IDS_SHA256, _CHECKPOINT_SHA256 = "fox_edge.calibration_sha256", "fox_edge.checkpoint_sha256"
_MAX_DATASETS = 1024
_MAX_NAME_BYTES = 1 << 12
_OUTPUT = "output.weight"


@dataclass(frozen=True)
class Importance:
    """Per matrix and column, the sum of squares of what the column was multiplied with.

    By Hugging Face names; of a tied model, the head's own sums stand under the embedding.
    """

    sums: Mapping[str, NDArray[np.float32]]  # name -> (C,), C the matrix's columns
    counts: Mapping[str, int]  # name -> tokens in the sums
    chunk_size: int = 0  # tokens of one window
    chunk_count: int = 0
    datasets: tuple[str, ...] = ()  # where the text came from
    ids_sha256: str | None = None  # of the calibration token ids
    checkpoint_sha256: str | None = None  # of the model that read them

    def mean_squares(self, name: str) -> NDArray[np.float32] | None:
        """Mean square per column (C,) of what a matrix read; None for a matrix without an entry."""
        if name not in self.sums:
            return None
        return np.asarray(self.sums[name] / np.float32(self.counts[name]), dtype=np.float32)


def matrix_columns(config: FoxConfig) -> dict[str, int]:
    """Every matrix that multiplies activations, and its columns; a tied head under the embedding's name."""
    head = EMBEDDING if config.tied else HEAD
    matrices = {name: shape[1] for name, shape in config.tensor_shapes().items() if len(shape) == 2}
    return {name: columns for name, columns in matrices.items() if name == head or name != EMBEDDING}


def write_imatrix(path: Path, importance: Importance, config: FoxConfig, *, replace: bool = False) -> None:
    """Write what `llama-quantize --imatrix` reads, whole or not at all.

    Raises ArtifactError for a file that exists and for a full disk, FoxEdgeError for sums that are no
    importance of this model.
    """
    if path.exists() and not replace:
        raise ArtifactError(f"{path}: exists already; choose another name, or say that it may be replaced")
    _check(path, importance.sums, importance.counts, config)
    try:
        with partial_files(path) as [partial]:
            _write(partial, importance)
    except OSError as error:
        raise ArtifactError(f"{path}: writing failed ({error.strerror}); nothing was kept") from None


class _Writer(gguf.GGUFWriter):
    """gguf-py's writer of a file that is no model."""

    def add_architecture(self) -> None:
        """An importance matrix has none."""


def _write(path: Path, importance: Importance) -> None:
    writer = _Writer(path, "")
    try:
        writer.add_type(gguf.GGUFType.IMATRIX)
        writer.add_array(_DATASETS, list(importance.datasets) or ["?"])
        writer.add_uint32(_CHUNK_COUNT, importance.chunk_count)
        writer.add_uint32(_CHUNK_SIZE, importance.chunk_size)
        for key, digest in (
            (_IDS_SHA256, importance.ids_sha256),
            (_CHECKPOINT_SHA256, importance.checkpoint_sha256),
        ):
            if digest is not None:
                writer.add_string(key, digest)
        for stored, name in sorted((stored_name(name), name) for name in importance.sums):
            writer.add_tensor(stored + _SUMS, np.ascontiguousarray(importance.sums[name], np.float32))
            writer.add_tensor(stored + _COUNTS, np.array([importance.counts[name]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_imatrix(path: Path, config: FoxConfig) -> Importance:
    """Read an importance matrix of this model, ours or llama-imatrix's, GGUF or .dat.

    The head's entry may be missing: llama-imatrix never makes one for a tied model. Raises ArtifactError
    naming the file, the matrix and the number for one that is damaged, hostile, or another model's.
    """
    with open_mapped(path) as data:
        read = _read_gguf if data[:4] == b"GGUF" else _read_dat
        found = read(path, data)
    names = _names(config)
    for stored in found.sums:
        if stored not in names:
            raise ArtifactError(
                f"{path}: has an entry for {stored}, which a model of {config.num_layers} layers has not"
            )
    # A tied head's entry may have been made when the model still had a matrix of its own for it.
    if "token_embd.weight" in found.sums and _OUTPUT in found.sums and config.tied:
        raise ArtifactError(
            f"{path}: has two entries, token_embd.weight and output.weight, for one tied matrix"
        )
    sums = {names[stored]: values for stored, values in found.sums.items()}
    counts = {names[stored]: count for stored, count in found.counts.items()}
    _check(path, sums, counts, config)
    return Importance(
        sums,
        counts,
        found.chunk_size,
        found.chunk_count,
        found.datasets,
        found.ids_sha256,
        found.checkpoint_sha256,
    )


def _names(config: FoxConfig) -> dict[str, str]:
    """llama.cpp's name -> Hugging Face's, of every matrix that may have an entry."""
    names = {stored_name(name): name for name in matrix_columns(config)}
    return names | ({_OUTPUT: EMBEDDING} if config.tied else {})


def _check(
    path: Path, sums: Mapping[str, NDArray[np.float32]], counts: Mapping[str, int], config: FoxConfig
) -> None:
    """All matrices but perhaps the head's, each with its columns' finite sums of squares and a count."""
    due = matrix_columns(config)
    optional = (EMBEDDING, HEAD)
    missing = [name for name in due if name not in sums and name not in optional]
    if missing:
        raise ArtifactError(
            f"{path}: has no entry for {stored_name(missing[0])} and {len(missing) - 1} more of "
            f"{len(due)} matrices; it is another model's"
        )
    strangers = [name for name in sums if name not in due]
    if strangers:
        raise FoxEdgeError(f"{path}: {strangers[0]} is no matrix that multiplies activations")
    for name, values in sums.items():
        where = f"{path}: {stored_name(name)}"
        if values.shape != (due[name],):
            raise ArtifactError(
                f"{where} has {values.size} columns, but the model's has {due[name]}; it is another model's"
            )
        if not np.isfinite(values).all() or values.min() < 0:
            bad = int(np.flatnonzero(~(np.isfinite(values) & (values >= 0)))[0])
            raise ArtifactError(f"{where} has {values[bad]:g} at column {bad}, but sums of squares are due")
        if not values.any():
            raise ArtifactError(f"{where} is zero at all {values.size} columns: nothing was ever multiplied")
        if counts.get(name, 0) < 1:
            raise ArtifactError(f"{where} was computed from {counts.get(name, 0)} tokens")


# --- the two formats, entries by llama.cpp's names ---------------------------------------------------------


def _read_gguf(path: Path, data: mmap.mmap) -> Importance:
    header = parse_header(path, data)
    if header.metadata.get("general.type") != "imatrix":
        raise ArtifactError(
            f"{path}: general.type is {header.metadata.get('general.type')!r}, but 'imatrix' is due"
        )
    sums: dict[str, NDArray[np.float32]] = {}
    counts: dict[str, int] = {}
    for name, info in header.tensors.items():
        stored, _, last = name.rpartition(".")
        if f".{last}" not in (_SUMS, _COUNTS):
            raise ArtifactError(f"{path}: tensor {name} is neither {_SUMS[1:]} nor {_COUNTS[1:]}")
        values = _floats(path, data, info)
        if f".{last}" == _SUMS:
            sums[stored] = values
        else:
            counts[stored] = _count(path, name, values)
    if sums.keys() != counts.keys():
        odd = min(sums.keys() ^ counts.keys())
        raise ArtifactError(f"{path}: {odd} has {'no counts' if odd in sums else 'counts, but no sums'}")
    return Importance(
        sums,
        counts,
        _whole(header, _CHUNK_SIZE),
        _whole(header, _CHUNK_COUNT),
        _datasets(header, data),
        _text(header, _IDS_SHA256),
        _text(header, _CHECKPOINT_SHA256),
    )


def _floats(path: Path, data: mmap.mmap, info: TensorInfo) -> NDArray[np.float32]:
    if info.type != "f32":
        raise ArtifactError(f"{path}: {info.name} has type {info.type}, but f32 is due")
    return np.frombuffer(data, "<f4", math.prod(info.shape), info.offset).astype(np.float32)


def _count(path: Path, name: str, values: NDArray[np.float32]) -> int:
    """A count, kept as a float: llama.cpp's are whole below 2^24 and rounded above."""
    if values.size != 1:
        raise ArtifactError(f"{path}: {name} holds {values.size} counts, one per expert; a Fox has none")
    count = float(values[0])
    if not math.isfinite(count) or count != round(count) or not 0 <= count < 1 << 53:
        raise ArtifactError(f"{path}: {name} is {count:g}, but a number of tokens is due")
    return int(count)


def _whole(header: Header, key: str) -> int:
    value = header.metadata.get(key)
    return value if isinstance(value, int) else 0


def _text(header: Header, key: str) -> str | None:
    value = header.metadata.get(key)
    return value if isinstance(value, str) else None


def _datasets(header: Header, data: mmap.mmap) -> tuple[str, ...]:
    info: Any = header.metadata.get(_DATASETS)
    if not isinstance(info, ArrayInfo) or info.type != STRING or info.length > _MAX_DATASETS:
        return ()
    return tuple(text.decode("utf-8", "replace") for text in array_texts(data, info))


def _read_dat(path: Path, data: mmap.mmap) -> Importance:
    """llama-imatrix's older format: no magic; per entry a name, a count of windows and means times it."""
    at = 0

    def take(size: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= size <= len(data) - at:
            raise ArtifactError(
                f"{path}: neither GGUF nor a whole .dat importance matrix: {size} bytes of {what} are due at "
                f"byte {at} of {len(data)}"
            )
        at += size
        return data[at - size : at]

    def number(what: str, limit: int = 1 << 31) -> int:
        value = int(struct.unpack("<i", take(4, what))[0])
        if not 0 <= value <= limit:
            raise ArtifactError(f"{path}: neither GGUF nor a .dat importance matrix ({value} {what})")
        return value

    sums: dict[str, NDArray[np.float32]] = {}
    counts: dict[str, int] = {}
    for _ in range(number("entries", 1 << 16)):
        name = take(number("bytes of a name", _MAX_NAME_BYTES), "a name").decode("utf-8", "replace")
        if not name.isprintable() or name in sums:
            raise ArtifactError(f"{path}: neither GGUF nor a .dat importance matrix (a name {name[:40]!r})")
        counts[name] = number("windows")
        sums[name] = np.frombuffer(take(4 * number("values"), "values"), "<f4").astype(np.float32)
    chunks = number("windows") if at < len(data) else 0
    source = take(number("bytes of a name", _MAX_NAME_BYTES), "a name") if at < len(data) else b""
    return Importance(sums, counts, 0, chunks, (source.decode("utf-8", "replace"),) if source else ())
