"""What is in a GGUF file: header, tensors, tie, vocabulary, read without running the model.

The header is read by fox_edge/gguf_format.py and checked by gguf_model.py before any library sees the file;
dequantization is gguf-py's numpy, written independently of the C that quantized.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.artifact import Artifact
from fox_edge.errors import ArtifactError, MissingPackageError, VerificationError
from fox_edge.gguf_format import TensorInfo, open_mapped, parse_header
from fox_edge.quant import EMBEDDING
from runtimes.llama_cpp.gguf_model import check_model

try:
    import gguf
except ImportError:
    raise MissingPackageError("gguf", "gguf") from None

# Weights that one step dequantizes: gguf-py's numpy makes several temporaries of this many float32.
_STEP_WEIGHTS = 1 << 20

_ROTATED = ("attn_q.weight", "attn_k.weight")
_IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
}


def dequantize(rows: NDArray[np.uint8], type: str) -> NDArray[np.float32]:
    """Rows of blocks (n, bytes of a row) as float32 (n, columns), by gguf-py where it knows the type."""
    if type in ("f32", "f16"):
        return rows.view("<f4" if type == "f32" else "<f2").astype(np.float32)
    if type == "q1_0":
        return _dequantize_q1_0(rows)
    return np.asarray(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type.upper()]), dtype=np.float32)


def _dequantize_q1_0(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Blocks of a float16 scale and 128 bits, lowest first: plus the scale where a bit is set, else minus."""
    blocks = rows.reshape(-1, 18)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return np.where(bits, scales, -scales).reshape(len(rows), -1)


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
        self.config = check_model(self._path, self._header, self._data)
        for record in artifact.manifest.tensors:
            info = self._header.tensors.get(record.stored_as)
            if info is not None and info.shape != record.shape:
                raise ArtifactError(
                    f"{self._path}: {info.name} has shape {list(info.shape)}, "
                    f"but the manifest says {list(record.shape)}"
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
        info, order = self.info(name), self._checked(name, start, stop)
        columns = info.shape[-1]
        out = np.empty((stop - start, columns), dtype=np.float32)
        step = max(1, _STEP_WEIGHTS // columns)
        for at in range(0, stop - start, step):
            out[at : at + step] = dequantize(self._raw(info, order[at : at + step]), info.type)
        return out

    def blocks(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """A copy of rows [start, stop) as they are stored (n, bytes of a row), in the checkpoint's order."""
        return self._raw(self.info(name), self._checked(name, start, stop))

    def _checked(self, name: str, start: int, stop: int) -> NDArray[np.int64]:
        """Where in the file those rows are; raises ValueError for rows that there are not."""
        info = self.info(name)
        count = math.prod(info.shape[:-1])
        if not 0 <= start <= stop <= count:
            raise ValueError(f"{name}: rows {start} to {stop} of {count}")
        return self._row_order(info, start, stop)

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

    def _raw(self, info: TensorInfo, order: NDArray[np.int64]) -> NDArray[np.uint8]:
        if self._data is None:
            raise ArtifactError(f"{self._path}: is closed")
        stored = np.frombuffer(self._data, np.uint8, info.bytes, info.offset)
        return stored.reshape(math.prod(info.shape[:-1]), -1)[order]

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
            from runtimes.llama_cpp.session import Vocabulary

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
