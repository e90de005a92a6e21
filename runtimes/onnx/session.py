"""An ONNX artifact as a session: ONNX Runtime on the CPU, keys and values updated in place.

Knows ONNX Runtime and the graph's inputs and outputs. Does not know how the artifact was made, nor what
tokens mean.

The KV buffers are as long as the context and are bound as past and present at once, so a step copies none
of them; their pages become real memory only as the context fills. The attention mask's length alone tells the
graph how much of them is in use, so forgetting is a smaller number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.artifact import Artifact
from fox_edge.config import FoxConfig
from fox_edge.errors import ContextOverflowError, FoxEdgeError
from fox_edge.heap import trim_heap
from fox_edge.processors import physical_cores
from fox_edge.quant import ONNX
from runtimes.base import (
    CPU,
    CUDA,
    SCORE_CHUNK,
    Logits,
    SessionOptions,
    SharingSession,
    check_choices,
    check_tokens,
)
from runtimes.kv_types import KV_TYPES, default_kv, kv_bytes_per_position
from runtimes.mapped_pages import drop_pages
from runtimes.memory import MemoryNeed, fitting_context
from runtimes.onnx.artifact import read_artifact_graph
from runtimes.onnx.engine import cache_shapes, check_device, open_engine, ort, past_name
from runtimes.onnx.external import External, onnx
from runtimes.onnx.kv import LayerPairs, kv_scales
from runtimes.onnx.prepacked import lay_out, open_packed
from runtimes.onnx.rewrite import quantize_kv, set_accuracy_level

# Tokens of a prompt that run at once: bounds the activations, long enough for the fast matrix kernels.
PREFILL_CHUNK = 256
# Matrices (chunk, widest) of float32 that live at once in a layer; fitted to peaks of starts that packed the
# weights (40 MB more) and of starts that found them packed.
_ACTIVATIONS = 3
# What onnxruntime takes of its own once it runs: pages of its library, arenas.
_FIXED = 14_000_000


class OnnxSession:
    """One conversation with an ONNX artifact; see `runtimes.base.Session`.

    Raises ArtifactError for a damaged model, ContextOverflowError when more positions are asked for than
    the model has, NotEnoughMemoryError, before anything is loaded, when they do not fit in memory.
    """

    def __init__(self, artifact: Artifact, options: SessionOptions | None = None) -> None:
        options = options or SessionOptions()
        limit = artifact.manifest.context
        if options.context is not None and not 0 < options.context <= limit:
            raise ContextOverflowError(
                f"a context of {options.context} positions was asked for; this model has 1 to {limit}"
            )
        _check_options(options)
        kv = options.kv or default_kv(ONNX)
        graph = read_artifact_graph(artifact)
        need = memory_need(artifact, graph, options)
        self.context = fitting_context(need, options.context, limit, str(artifact.path))
        self._begin(_open(artifact, graph, kv, options))

    def _begin(self, engine: Any) -> None:
        """An empty conversation with an open graph; `context` is known."""
        self.length = 0
        self._session: Any = engine
        self._binding = self._session.io_binding()
        shape = {out.name: out.shape for out in self._session.get_outputs()}["logits"]
        self.vocab_size: int = shape[2]
        self._bind_cache()
        self._tokens = np.zeros(max(PREFILL_CHUNK, SCORE_CHUNK), np.int64)
        self._mask = np.ones(self.context, np.int64)
        self._keep = np.ones((), np.int64)
        self._logits = np.empty((1, self.vocab_size), np.float32)
        self._bind("logits_to_keep", self._keep, ())

    @staticmethod
    def need(artifact: Artifact, options: SessionOptions) -> MemoryNeed:
        """What it takes to open this, told from headers; raises FoxEdgeError for choices that do not go."""
        _check_options(options)
        return memory_need(artifact, read_artifact_graph(artifact), options)

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append tokens to the cache in chunks; logits (vocab,) after the last."""
        ids = self._check(tokens)
        for first in range(0, len(ids), PREFILL_CHUNK):
            self._run(ids[first : first + PREFILL_CHUNK], self._logits)
        return self._logits[0].copy()

    def step(self, token: int) -> Logits:
        """Append one token; logits (vocab,) after it."""
        return self.prefill((token,))

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        """Logits after each of `tokens[start:]`: chunks (n, vocab), n <= SCORE_CHUNK."""
        return self._score(self._check(tokens), start)

    def _score(self, ids: NDArray[np.int64], start: int) -> Iterator[Logits]:
        """`score` after its checks, which come with the call and not with the first row."""
        for first in range(0, min(start, len(ids)), PREFILL_CHUNK):
            self._run(ids[first : min(first + PREFILL_CHUNK, start)], self._logits)
        for first in range(start, len(ids), SCORE_CHUNK):
            chunk = ids[first : first + SCORE_CHUNK]
            logits = np.empty((len(chunk), self.vocab_size), np.float32)
            self._run(chunk, logits)
            yield logits

    def truncate(self, length: int) -> None:
        """Keep only the first `length` cached tokens."""
        self.length = min(self.length, max(0, length))

    def reset(self) -> None:
        """Empty the cache."""
        self.truncate(0)

    def another(self) -> OnnxSession:
        """Another conversation, empty, of the same context, on the same weights."""
        if self._session is None:
            raise FoxEdgeError("this session is closed")
        other = OnnxSession.__new__(OnnxSession)
        other.context = self.context
        other._begin(self._session)
        return other

    def copy_prefix(self, source: SharingSession, length: int) -> None:
        """Hold the first `length` tokens of another conversation on the same weights."""
        assert isinstance(source, OnnxSession) and source is not self
        if source.length < length:
            raise FoxEdgeError(f"{length} tokens cannot be copied from a conversation of {source.length}")
        for name, held in self._buffers.items():
            held[:, :, :length] = source._buffers[name][:, :, :length]
        self.length = length

    def close(self) -> None:
        """Free the KV buffers, and the model with the last conversation."""
        self._binding = self._session = None
        self._buffers: dict[str, NDArray[Any]] = {}

    def kv_extremes(self) -> LayerPairs:
        """Largest magnitudes in the cache so far, of each layer's keys and values: (kv_heads, head_dim)."""
        largest = {
            name: np.abs(held[0, :, : self.length]).max(axis=1) for name, held in self._buffers.items()
        }
        layers = range(len(largest) // 2)
        return [(largest[f"present.{n}.key"], largest[f"present.{n}.value"]) for n in layers]

    def _bind_cache(self) -> None:
        """One buffer per layer and part, past and present in one."""
        self._buffers = {}
        for name, (heads, width, kind) in cache_shapes(self._session).items():
            # On the CPU onnxruntime works in the array itself.
            self._buffers[name] = np.zeros((1, heads, self.context, width), kind)
            buffer = ort.OrtValue.ortvalue_from_numpy(self._buffers[name])
            self._binding.bind_ortvalue_input(past_name(name), buffer)
            self._binding.bind_ortvalue_output(name, buffer)

    def _bind(self, name: str, array: NDArray[np.int64], shape: tuple[int, ...]) -> None:
        """Let an input read the beginning of a preallocated array."""
        self._binding.bind_input(name, "cpu", 0, np.int64, shape, array.ctypes.data)

    def _check(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """The tokens as an array, once it is sure that they can be appended."""
        if self._session is None:
            raise FoxEdgeError("this session is closed")
        check_tokens(self, tokens)
        return np.asarray(tokens, np.int64)

    def _run(self, ids: NDArray[np.int64], logits: Logits) -> None:
        """Append a chunk; fill `logits` (kept, vocab) with those of its last positions."""
        count = len(ids)
        self._tokens[:count] = ids
        self._keep[...] = len(logits)
        self._bind("input_ids", self._tokens, (1, count))
        self._bind("attention_mask", self._mask, (1, self.length + count))
        self._binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        self.length += count


def _check_options(options: SessionOptions) -> None:
    """Raises FoxEdgeError for choices that onnxruntime does not have."""
    takes = ("accuracy_level",)
    check_choices(options, "onnxruntime", tuple(KV_TYPES[ONNX]), takes, devices=(CPU, CUDA))
    check_device(options)


def memory_need(artifact: Artifact, graph: onnx.ModelProto, options: SessionOptions) -> MemoryNeed:
    """What a session of this graph takes to generate: packed matrices, other weights, buffers, KV cache."""
    config = FoxConfig.read(artifact.path / "config.json")
    # A tied matrix has several names for the same bytes: files are counted, not tensors.
    stored = sum(path.stat().st_size for path in _data_files(artifact, graph))
    widest = max(config.hidden_size, 2 * config.intermediate_size)
    chunk = min(PREFILL_CHUNK, options.context or PREFILL_CHUNK)
    return MemoryNeed(
        weights=stored + sum(slot.size - slot.raw for slot in lay_out(graph)),
        buffers=_FIXED + 4 * (_ACTIVATIONS * chunk * widest + config.vocab_size),
        per_position=options.conversations * kv_bytes_per_position(config, ONNX, options.kv),
    )


def _data_files(artifact: Artifact, graph: onnx.ModelProto) -> set[Path]:
    """The files that weights are in."""
    return {
        External.of(tensor, artifact.path).path
        for tensor in graph.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


def _open(artifact: Artifact, graph: onnx.ModelProto, kv: str, options: SessionOptions) -> Any:
    """The onnxruntime session of an artifact's graph, rewritten as the options say."""
    threads = options.threads or physical_cores()
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    if options.accuracy_level is not None:
        set_accuracy_level(model, options.accuracy_level)
    if kv == "int8":
        quantize_kv(
            model, kv_scales(artifact, lambda tokens: _extremes(artifact, options, tokens), options.cache)
        )
    # Packed matrices depend on the level; they are kept for the one that the artifact asks for.
    # They are packed for a processor's kernels.
    if options.cache and options.accuracy_level is None and options.device != CUDA:
        engine = open_packed(artifact, graph, model, threads)
    else:
        engine = open_engine(model, artifact.path, threads, artifact.model_path, device=options.device)
    # Scales were read in order to be packed; of the embedding, rows come as they are asked for.
    drop_pages(*_data_files(artifact, graph))
    trim_heap()
    return engine


def _extremes(artifact: Artifact, options: SessionOptions, tokens: list[int]) -> LayerPairs:
    """Run tokens on the ordinary cache and see how large keys and values become."""
    tokens = tokens[: artifact.manifest.context]
    ordinary = replace(options, kv=None, context=len(tokens))
    with contextlib.closing(OnnxSession(artifact, ordinary)) as session:
        session.prefill(tokens)
        return session.kv_extremes()
