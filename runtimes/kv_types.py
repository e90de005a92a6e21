"""What a KV cache may store: the types of each runtime, and the bytes that a position takes in them.

Knows sizes; not how a runtime is told. The first type is the runtime's own; others change answers a little.
"""

from __future__ import annotations

from collections.abc import Mapping

from fox_edge.artifact import Manifest
from fox_edge.config import FoxConfig
from fox_edge.quant import GGUF, ONNX, PTE

TORCH = "torch"

# Format -> name of a type -> numbers in a block, bytes of a block. PyTorch's is always that of the weights.
KV_TYPES: Mapping[str, Mapping[str, tuple[int, int]]] = {
    GGUF: {"f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)},
    ONNX: {"float32": (1, 4), "int8": (1, 1)},
    PTE: {"float32": (1, 4), "int8": (1, 1)},
    TORCH: {"bfloat16": (1, 2), "float32": (1, 4)},
}
# Bytes beside the numbers of a head: ExecuTorch's float32 scale and int8 zero point.
_BESIDE_HEAD = {(PTE, "int8"): 5}


def default_kv(format: str) -> str:
    """What a runtime stores unless told otherwise."""
    return next(iter(KV_TYPES[format]))


def artifact_kv(manifest: Manifest) -> str:
    """What the cache of an artifact stores by itself: an ExecuTorch program's is part of it."""
    told = str((manifest.pte or {}).get("kv"))
    return told if told in KV_TYPES[manifest.format] else default_kv(manifest.format)


def kv_bytes_per_position(config: FoxConfig, format: str, kv: str | None = None) -> int:
    """Bytes of the keys and values of one position, all layers; heads are whole blocks."""
    kind = kv or default_kv(format)
    block, size = KV_TYPES[format][kind]
    beside = config.num_kv_heads * _BESIDE_HEAD.get((format, kind), 0)
    return 2 * config.num_layers * (config.kv_dim * size // block + beside)
