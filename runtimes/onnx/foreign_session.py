"""A session with an ONNX model that another tool exported: ONNX Runtime, fed as its graph asks.

Such graphs may want positions, may give logits for every token they are fed, and mostly make new keys and
values instead of extending the old ones. Knows ONNX Runtime and the description of the graph; nothing of what
wrote it. The cache never passes through numpy, except where a conversation is cut back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.errors import ArtifactError, ContextOverflowError, FoxEdgeError
from fox_edge.processors import physical_cores
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
from runtimes.memory import MemoryNeed, fitting_context
from runtimes.onnx.engine import check_device, open_on, ort
from runtimes.onnx.foreign import ForeignOnnx, Interface

# Tokens of a prompt that run at once, and the most that their logits may take where all of them come back:
# at Fox-1's vocabulary 256 tokens, as much as these tools' own generators hold for a prompt of that length.
PREFILL_CHUNK = 256
MAX_LOGITS_BYTES = 256 << 20
_QUIET = 3  # onnxruntime's log level for errors only


class ForeignSession:
    """One conversation with a foreign ONNX model; see `runtimes.base.Session`.

    Raises ArtifactError for a model that onnxruntime refuses, ContextOverflowError when more positions are
    asked for than the model's configuration has, NotEnoughMemoryError when they would not fit in memory.
    """

    def __init__(self, foreign: ForeignOnnx, options: SessionOptions | None = None) -> None:
        options = options or SessionOptions()
        if options.context is not None and not 0 < options.context <= foreign.context:
            raise ContextOverflowError(
                f"a context of {options.context} positions was asked for; this model has 1 to "
                f"{foreign.context}"
            )
        self._path, self._graph = foreign.model_path, foreign.interface
        self.vocab_size = self._graph.vocab_size
        self.length = 0
        self._chunk = _chunk(self._graph)
        need = self.need(foreign, options)
        self.context = fitting_context(need, options.context, foreign.context, str(foreign.path))
        self._session: Any = self._open(options.threads or physical_cores(), options.device)
        self._past: list[Any] = []
        self._past_length = 0
        self._empty_cache()

    @staticmethod
    def need(foreign: ForeignOnnx, options: SessionOptions) -> MemoryNeed:
        """What it takes to open this; raises FoxEdgeError for choices that do not go."""
        graph = foreign.interface
        kv = (np.dtype(graph.kv_type).name,)
        check_choices(options, "another tool's graph", kv, devices=(CPU, CUDA))
        check_device(options)
        # Keys and values that are made anew lie beside the old ones for a moment, of one conversation.
        per_position = graph.kv_bytes_per_position * (options.conversations + (not graph.shared))
        buffers = _row_bytes(graph) * (_chunk(graph) if _all_rows(graph) else 1)
        return MemoryNeed(foreign.weight_bytes, buffers, per_position)

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append tokens to the cache in chunks; logits (vocab,) after the last."""
        ids = self._check(tokens)
        rows = np.empty((0, self.vocab_size), np.float32)
        for first in range(0, len(ids), self._chunk):
            rows = self._run(ids[first : first + self._chunk], 1)
        return rows[-1].copy()

    def step(self, token: int) -> Logits:
        """Append one token; logits (vocab,) after it."""
        return self.prefill((token,))

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        """Logits after each of `tokens[start:]`: chunks (n, vocab), n <= SCORE_CHUNK.

        A graph that only gives the last position's logits is fed one token at a time.
        """
        return self._score(self._check(tokens), start)

    def _score(self, ids: NDArray[np.int64], start: int) -> Iterator[Logits]:
        """`score` after its checks, which come with the call and not with the first row."""
        for first in range(0, min(start, len(ids)), self._chunk):
            self._run(ids[first : min(first + self._chunk, start)], 1)
        for first in range(start, len(ids), SCORE_CHUNK):
            chunk = ids[first : first + SCORE_CHUNK]
            if self._graph.last_only:
                yield np.concatenate([self._run(chunk[i : i + 1], 1) for i in range(len(chunk))])
            else:
                yield self._run(chunk, len(chunk))

    def truncate(self, length: int) -> None:
        """Keep only the first `length` cached tokens."""
        self.length = min(self.length, max(0, length))

    def reset(self) -> None:
        """Empty the cache."""
        self.truncate(0)

    def another(self) -> ForeignSession:
        """Another conversation, empty, of the same context, on the same weights."""
        if self._session is None:
            raise FoxEdgeError("this session is closed")
        other = copy.copy(self)
        other.length = 0
        other._empty_cache()
        return other

    def copy_prefix(self, source: SharingSession, length: int) -> None:
        """Hold the first `length` tokens of another conversation on the same weights."""
        assert isinstance(source, ForeignSession) and source is not self
        if source.length < length:
            raise FoxEdgeError(f"{length} tokens cannot be copied from a conversation of {source.length}")
        kept = [np.ascontiguousarray(value.numpy()[:, :, :length]) for value in source._past]
        self.length = length
        if self._graph.shared:
            for array, value in zip(kept, self._past, strict=True):
                whole = value.numpy()
                whole[:, :, :length] = array
                value.update_inplace(whole)
            return
        self._past = [ort.OrtValue.ortvalue_from_numpy(value) for value in kept]
        self._past_length = length

    def close(self) -> None:
        """Free its keys and values, and the model with the last conversation."""
        self._session, self._past = None, []

    def _open(self, threads: int, device: str | None) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _QUIET
        # Patterns of memory use are remembered per input shape, and every step has its own.
        options.enable_mem_pattern = False
        return self._ask("open", lambda: open_on(str(self._path), options, device, self._path))

    def _ask(self, what: str, call: Any) -> Any:
        """Call onnxruntime, which raises its own kinds of error and plain ones alike; all are this file's."""
        try:
            return call()
        except FoxEdgeError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ArtifactError(f"{self._path}: onnxruntime cannot {what} it ({reason})") from error

    def _check(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """The tokens as an array, once it is sure that they can be appended."""
        if self._session is None:
            raise FoxEdgeError("this session is closed")
        check_tokens(self, tokens)
        return np.asarray(tokens, np.int64)

    def _empty_cache(self) -> None:
        """Buffers as long as the context where the graph extends them in place, else none of any length."""
        graph = self._graph
        self._past_length = self.context if graph.shared else 0
        shape = (1, graph.kv_heads, self._past_length, graph.head_dim)
        self._past = [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, graph.kv_type)) for _ in graph.cache]

    def _cut_cache(self) -> None:
        """Forget what `truncate` gave up; buffers in place are told by the mask alone."""
        if self._graph.shared or self._past_length == self.length:
            return
        if self.length == 0:
            self._empty_cache()
            return
        kept = [np.ascontiguousarray(value.numpy()[:, :, : self.length]) for value in self._past]
        self._past = [ort.OrtValue.ortvalue_from_numpy(value) for value in kept]
        self._past_length = self.length

    def _run(self, ids: NDArray[np.int64], keep: int) -> Logits:
        """Append a chunk; float32 logits (n, vocab) of its last n >= `keep` positions."""
        self._cut_cache()
        graph, total = self._graph, self.length + len(ids)
        fed = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.length, total, dtype=np.int64)[None],
        }
        if graph.keep is not None:
            fed[graph.keep] = np.full((1,) * graph.keep_rank, keep, np.int64)
        binding = self._session.io_binding()
        for name, value in fed.items():
            if name in graph.inputs:
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        binding.bind_output("logits", "cpu")
        for (past, present), value in zip(graph.cache, self._past, strict=True):
            binding.bind_ortvalue_input(past, value)
            if graph.shared:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present, "cpu")
        self._ask("run", lambda: self._session.run_with_iobinding(binding))
        logits, *present_values = binding.get_outputs()
        rows: NDArray[Any] = logits.numpy()
        if rows.ndim != 3 or (rows.shape[0], rows.shape[2]) != (1, self.vocab_size) or rows.shape[1] < keep:
            raise ArtifactError(
                f"{self._path}: gave logits of shape {list(rows.shape)} for {len(ids)} tokens and a "
                f"vocabulary of {self.vocab_size}"
            )
        if not graph.shared:
            self._past, self._past_length = present_values, total
        self.length = total
        return rows[0].astype(np.float32, copy=False)


def _all_rows(graph: Interface) -> bool:
    """Whether logits of every token that is fed come back."""
    return not graph.last_only and graph.keep is None


def _row_bytes(graph: Interface) -> int:
    return graph.vocab_size * np.dtype(graph.logits_type).itemsize


def _chunk(graph: Interface) -> int:
    """Tokens of a prompt that run at once."""
    if not _all_rows(graph):
        return PREFILL_CHUNK
    return min(PREFILL_CHUNK, max(1, MAX_LOGITS_BYTES // _row_bytes(graph)))
