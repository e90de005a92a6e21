"""What llama.cpp will take for a model at given choices, told without loading a weight.

The file is mapped; what ggml's kernels want in another layout is copied, and ggml itself is asked which
matrices those are, on this processor. The rest is reckoned by formulas that were fitted to measurements;
`python -m benchmarks.memory` holds them to new ones. Knows ggml's device interface; not how a session opens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import gguf
import llama_cpp.llama_cpp as lib

from fox_edge.artifact import Artifact, TensorRecord
from fox_edge.config import FoxConfig
from fox_edge.quant import EMBEDDING, GGUF
from runtimes.base import SCORE_CHUNK, SessionOptions
from runtimes.kv_types import kv_bytes_per_position
from runtimes.llama_cpp.choices import for_sharing, shares_a_context
from runtimes.llama_cpp.context import BATCH, CONTEXT_STEP, SHARED_BATCH
from runtimes.memory import MemoryNeed

_CPU = 0  # enum ggml_backend_dev_type
_BUFFER_AT = 8  # offset of the field `buffer` in struct ggml_tensor, behind its type
_SCRATCH = 1 << 14  # bytes that hold three tensors' descriptions
_F32, _F32_BYTES = 0, 4
# What the model and its context take beside weights and tensors.
_FIXED = 9_000_000
# Bytes per piece of the vocabulary: texts, scores, and the table that finds a piece by its text.
_PIECE = 167


def memory_need(artifact: Artifact, config: FoxConfig, options: SessionOptions) -> MemoryNeed:
    """The file and what is copied of it, the vocabulary and a batch's buffers, the KV cache."""
    weights = artifact.model_path.stat().st_size
    if options.repack is not False:
        copied = {t.name: copied_bytes(t, config.tied) for t in artifact.manifest.tensors}
        # A file that is not mapped is read once, into the layout that is wanted; the tied matrix into both.
        read = sum(t.bytes for t in artifact.manifest.tensors if copied[t.name] and t.name != EMBEDDING)
        weights += sum(copied.values()) - (read if options.mmap is False else 0)
    contexts, batch, rows = options.conversations, BATCH, 0
    if shares_a_context(options):
        # One set of buffers for all, but a row of logits for each in a pass: in the graph, and outside it.
        contexts, batch, rows = 1, SHARED_BATCH, min(options.conversations, SCORE_CHUNK)
        options = for_sharing(options)
    tokens = min(batch, options.context or batch)
    return MemoryNeed(
        weights=weights,
        buffers=_FIXED
        + (_PIECE + 2 * _F32_BYTES * rows) * config.vocab_size
        + contexts * _activations(config, tokens),
        per_position=options.conversations * kv_bytes_per_position(config, GGUF, options.kv),
        scratch_per_position=contexts * _scores(config, tokens, options.flash_attention),
        step=CONTEXT_STEP,
    )


def _activations(config: FoxConfig, tokens: int) -> int:
    """Bytes of a batch's intermediate results, and of what products are computed from."""
    return _F32_BYTES * tokens * (2 * config.intermediate_size + 4 * config.hidden_size)


def _scores(config: FoxConfig, tokens: int, flash_attention: bool | None) -> int:
    """Bytes per position of what a batch's attention holds.

    In one pass a mask in float16; else a mask in float32 and every head's scores.
    """
    return tokens * (4 * (1 + config.num_heads) if flash_attention is False else 2)


def copied_bytes(tensor: TensorRecord, tied: bool) -> int:
    """Bytes of the copy that a weight gets at load when repacking is on; 0 for one that stays as it is."""
    # Rows of an embedding are looked up, which no packed layout can; as the head it is multiplied too.
    if len(tensor.shape) != 2 or (tensor.name == EMBEDDING and not tied):
        return 0
    if tensor.type.upper() not in gguf.GGMLQuantizationType.__members__:
        return 0  # a manifest that says so is told by `verify`
    return _packed_bytes(tensor.type, *tensor.shape)


@cache
def _packed_bytes(kind: str, rows: int, columns: int) -> int:
    """Bytes of a matrix in the first layout of its own that ggml would multiply it in; 0 where it has none.

    What llama.cpp does at load, with a matrix that holds nothing: a product is described, and every extra
    kind of buffer is asked whether it takes it.
    """
    ggml = _ggml()
    device = ggml.ggml_backend_dev_by_type(_CPU)
    number = int(gguf.GGMLQuantizationType[kind.upper()])
    for buffer_type in _extra_buffer_types(device):
        with _scratch() as context:
            weight = ggml.ggml_new_tensor_2d(context, number, columns, rows)
            product = ggml.ggml_mul_mat(context, weight, ggml.ggml_new_tensor_2d(context, _F32, columns, 512))
            buffer = ggml.ggml_backend_buft_alloc_buffer(buffer_type, 0)
            ctypes.c_void_p.from_address(weight + _BUFFER_AT).value = buffer
            try:
                if ggml.ggml_backend_dev_supports_op(device, product):
                    return int(ggml.ggml_backend_buft_get_alloc_size(buffer_type, weight))
            finally:
                ggml.ggml_backend_buffer_free(buffer)
    return 0


def _extra_buffer_types(device: int) -> Iterator[int]:
    """The kinds of memory in which this processor's kernels have layouts of their own."""
    ggml = _ggml()
    registry = ggml.ggml_backend_dev_backend_reg(device)
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return
    listing = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    n = 0
    while listing and listing[n]:
        yield int(listing[n])
        n += 1


class _InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@contextmanager
def _scratch() -> Iterator[int]:
    """A ggml context that holds descriptions of tensors and no numbers."""
    context = _ggml().ggml_init(_InitParams(_SCRATCH, None, True))
    try:
        yield context
    finally:
        _ggml().ggml_free(context)


@cache
def _ggml() -> Any:
    """ggml's functions, found through the library that llama.cpp's own are in."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library = lib._lib
    for name, result, arguments in (
        ("ggml_init", pointer, (_InitParams,)),
        ("ggml_free", None, (pointer,)),
        ("ggml_new_tensor_2d", pointer, (pointer, ctypes.c_int, integer, integer)),
        ("ggml_mul_mat", pointer, (pointer, pointer, pointer)),
        ("ggml_backend_dev_by_type", pointer, (ctypes.c_int,)),
        ("ggml_backend_dev_backend_reg", pointer, (pointer,)),
        ("ggml_backend_reg_get_proc_address", pointer, (pointer, ctypes.c_char_p)),
        ("ggml_backend_buft_alloc_buffer", pointer, (pointer, ctypes.c_size_t)),
        ("ggml_backend_buft_get_alloc_size", ctypes.c_size_t, (pointer, pointer)),
        ("ggml_backend_buffer_free", None, (pointer,)),
        ("ggml_backend_dev_supports_op", ctypes.c_bool, (pointer, pointer)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
