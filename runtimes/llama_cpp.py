"""GGUF artifacts in llama.cpp, through its low-level bindings: tokens in, chosen logits out.

Only rows of logits that someone reads exist: the buffers of the package's own `Llama` class (a row per
batch or context position, gigabytes with Fox's 256,000 pieces) are not used. Knows nothing of sampling or
of how the file was made.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.errors import ArtifactError, ContextOverflowError, FoxEdgeError, MissingPackageError
from runtimes.base import (
    SCORE_CHUNK,
    Logits,
    SessionOptions,
    SharingSession,
    check_tokens,
)
from runtimes.gguf_model import read_config
from runtimes.memory import MemoryNeed, fitting_context

try:
    import llama_cpp.llama_cpp as lib
except ImportError:
    raise MissingPackageError("llama-cpp-python", "gguf") from None

from runtimes.llama_cpp_choices import check_kv_blocks, check_options, choose_for_context, choose_for_model
from runtimes.llama_cpp_memory import memory_need

# Tokens of a prompt that run at once.
BATCH = 512
# The KV cache is zeroed when it is made, so every position asked for is memory taken.
DEFAULT_CONTEXT = 4096
# The conversation, and a second sequence that exists only while a prefix is handed to another context.
_SEQUENCE, _PREFIX = 0, 1
# Rows of logits that a further conversation on the same weights can have at once: 16 x 256,000 float32 are
# 16 MB, and its compute buffer has them twice.
_FURTHER_ROWS = 16
_LOG_ERROR = 4  # enum ggml_log_level

_errors: deque[str] = deque(maxlen=8)


@lib.llama_log_callback
def _log(level: int, text: bytes, _user_data: Any) -> None:
    """Keeps llama.cpp silent, and its last complaints for our own sentence."""
    if level == _LOG_ERROR and text:
        _errors.append(text.decode("utf-8", "replace").strip())


@cache
def _start() -> None:
    """Once per process: llama.cpp's global state, and its log into our hands.

    The callback lives as long as this module does.
    """
    lib.llama_backend_init()
    lib.llama_log_set(_log, ctypes.c_void_p(None))


def _complaint() -> str:
    """What llama.cpp said last, for the end of a sentence."""
    # It ends with a general "failed to load model"; the first line says why.
    return f" (llama.cpp: {_errors[0]})" if _errors else ""


def _load_model(path: Path, options: SessionOptions, *, vocab_only: bool = False) -> int:
    """Open a GGUF file whose header was looked at; raises ArtifactError."""
    _start()
    _errors.clear()
    params = lib.llama_model_default_params()
    params.vocab_only = vocab_only
    choose_for_model(params, options)
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ArtifactError(f"{path}: llama.cpp cannot open it{_complaint()}")
    return int(model)


class Vocabulary:
    """The vocabulary of a GGUF file as llama.cpp reads it, without the weights."""

    def __init__(self, path: Path) -> None:
        read_config(path)
        self._model: int | None = _load_model(path, SessionOptions(), vocab_only=True)
        self._vocab = lib.llama_model_get_vocab(self._model)

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids without <bos>; `special` recognizes control tokens written in the text."""
        if self._model is None:
            raise FoxEdgeError("this vocabulary is closed")
        data = text.encode("utf-8")
        room = len(data) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            count = lib.llama_tokenize(self._vocab, data, len(data), ids, room, False, special)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def close(self) -> None:
        """Free it."""
        if self._model is not None:
            lib.llama_model_free(self._model)
            self._model = None


class _Batch:
    """Tokens for one `llama_decode`; positions and sequence are left to llama.cpp, which continues."""

    def __init__(self, size: int) -> None:
        self._tokens = (ctypes.c_int32 * size)()
        self._wanted = (ctypes.c_int8 * size)()
        self.struct = lib.llama_batch(
            n_tokens=0,
            token=ctypes.cast(self._tokens, ctypes.POINTER(ctypes.c_int32)),
            logits=ctypes.cast(self._wanted, ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, tokens: Sequence[int], wanted: int) -> Any:
        """Put tokens in; logits are computed for the last `wanted` of them."""
        count = len(tokens)
        flags: list[ctypes.c_int8 | int] = [int(n >= count - wanted) for n in range(count)]
        # int(): a numpy integer is no integer to ctypes.
        self._tokens[:count] = [int(token) for token in tokens]
        self._wanted[:count] = flags
        self.struct.n_tokens = count
        return self.struct


class _Weights:
    """A loaded model that several contexts may use; freed when the last one lets go."""

    def __init__(self, path: Path, options: SessionOptions) -> None:
        self.model = _load_model(path, options)
        self._users = 0

    def take(self) -> _Weights:
        """Count one more user."""
        self._users += 1
        return self

    def let_go(self) -> None:
        """Count one user less."""
        self._users -= 1
        if self._users == 0:
            lib.llama_model_free(self.model)


class LlamaCppSession:
    """One conversation with a GGUF model; see `runtimes.base.SharingSession`.

    Raises ArtifactError for a damaged file, ContextOverflowError for a context beyond the model's,
    NotEnoughMemoryError, before anything is loaded, when it does not fit in memory.
    """

    def __init__(
        self, artifact: Artifact, options: SessionOptions | None = None, weights: _Weights | None = None
    ) -> None:
        self._weights: _Weights | None = None
        self._context: int | None = None
        options = options or SessionOptions()
        check_options(options)
        most = artifact.manifest.context
        if options.context is not None and not 1 <= options.context <= most:
            asked = options.context
            raise ContextOverflowError(f"a context of {asked} tokens, but the model has 1 to {most}")
        if weights is None:
            limit = min(most, DEFAULT_CONTEXT) if options.context is None else most
            need = self.need(artifact, options)
            self.context = fitting_context(need, options.context, limit, str(artifact.path))
        else:
            # Conversations that share weights were reckoned with when the first was opened.
            assert options.context is not None
            self.context = options.context
        self._artifact, self._options = artifact, options
        self._rows = SCORE_CHUNK if weights is None else _FURTHER_ROWS
        self._weights = (weights or _Weights(artifact.model_path, options)).take()
        try:
            self.vocab_size = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._weights.model)))
            trained = int(lib.llama_model_n_ctx_train(self._weights.model))
            if most > trained:
                raise ArtifactError(
                    f"{artifact.path / MANIFEST}: promises a context of {most}, but the model has {trained}"
                )
            self._context = self._open_context(artifact.model_path, options)
        except BaseException:
            self.close()
            raise
        self._memory = lib.llama_get_memory(self._context)
        self._batch = _Batch(BATCH)
        self._length = 0

    @staticmethod
    def need(artifact: Artifact, options: SessionOptions) -> MemoryNeed:
        """What it takes to open this, told from headers; raises FoxEdgeError for choices that do not go."""
        check_options(options)
        config = read_config(artifact.model_path)
        check_kv_blocks(options, config)
        return memory_need(artifact, config, options, BATCH)

    def _open_context(self, path: Path, options: SessionOptions) -> int:
        params = lib.llama_context_default_params()
        params.n_ctx = self.context
        params.n_batch = params.n_ubatch = BATCH
        # Without these the compute buffer is made for a row of logits per batch token: 524 MB for Fox.
        params.n_outputs_max = params.n_outputs_max_per_seq = self._rows
        # A second sequence in the same cells, by which `copy_prefix` picks the tokens that it copies.
        params.n_seq_max, params.kv_unified = 2, True
        choose_for_context(params, options)
        assert self._weights is not None
        context = lib.llama_init_from_model(self._weights.model, params)
        if not context:
            raise FoxEdgeError(
                f"{path}: llama.cpp cannot make a context of {self.context} tokens{_complaint()}"
            )
        return int(context)

    def __enter__(self) -> LlamaCppSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # At interpreter exit the module may be gone already; so is the process's memory, soon.
        if lib is not None:
            self.close()

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self._length

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append tokens in batches; logits (vocab,) after the last, the only row computed."""
        self._check(tokens)
        last = (len(tokens) - 1) // BATCH * BATCH
        self._append(tokens[:last])
        return self._decode(tokens[last:], 1)[0]

    def step(self, token: int) -> Logits:
        """Append one token; logits (vocab,) after it."""
        return self.prefill((token,))

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        """Logits after each of `tokens[start:]`: chunks (n, vocab), n <= SCORE_CHUNK."""
        self._check(tokens)
        self._append(tokens[:start])
        for first in range(start, len(tokens), self._rows):
            chunk = tokens[first : first + self._rows]
            yield self._decode(chunk, len(chunk))

    def truncate(self, length: int) -> None:
        """Keep only the first `length` cached tokens."""
        self._length = min(self._length, max(0, length))
        if self._context is not None:
            lib.llama_memory_seq_rm(self._memory, _SEQUENCE, self._length, -1)

    def reset(self) -> None:
        """Empty the cache."""
        self.truncate(0)

    def another(self) -> LlamaCppSession:
        """Another conversation, empty, of the same context, on the same weights."""
        if self._weights is None:
            raise FoxEdgeError("this session is closed")
        return LlamaCppSession(self._artifact, replace(self._options, context=self.context), self._weights)

    def copy_prefix(self, source: SharingSession, length: int) -> None:
        """Hold the first `length` tokens of another conversation, through llama.cpp's own saved state."""
        assert isinstance(source, LlamaCppSession) and source is not self
        if source.length < length:
            raise FoxEdgeError(f"{length} tokens cannot be copied from a conversation of {source.length}")
        self.reset()
        if not length:
            return
        lib.llama_memory_seq_cp(source._memory, _SEQUENCE, _PREFIX, 0, length)
        try:
            size = lib.llama_state_seq_get_size(source._context, _PREFIX)
            state = (ctypes.c_uint8 * size)()
            written = lib.llama_state_seq_get_data(source._context, state, size, _PREFIX)
        finally:
            lib.llama_memory_seq_rm(source._memory, _PREFIX, -1, -1)
        if not written or not lib.llama_state_seq_set_data(self._context, state, written, _SEQUENCE):
            self.reset()
            raise FoxEdgeError(f"llama.cpp cannot copy {length} tokens of a conversation{_complaint()}")
        self._length = length

    def close(self) -> None:
        """Free the context, and the model with the last one; twice does no harm."""
        if self._context is not None:
            lib.llama_free(self._context)
            self._context = None
        if self._weights is not None:
            self._weights.let_go()
            self._weights = None

    def _check(self, tokens: Sequence[int]) -> None:
        """Refuse what cannot be appended, before the cache is touched."""
        if self._context is None:
            raise FoxEdgeError("this session is closed")
        check_tokens(self, tokens)

    def _append(self, tokens: Sequence[int]) -> None:
        """Append tokens whose logits nobody reads."""
        for first in range(0, len(tokens), BATCH):
            self._decode(tokens[first : first + BATCH], 0)

    def _decode(self, tokens: Sequence[int], wanted: int) -> Logits:
        """Append one batch; logits (wanted, vocab) after its last tokens, a copy."""
        _errors.clear()
        status = lib.llama_decode(self._context, self._batch.fill(tokens, wanted))
        if status != 0:
            # What part of a failed batch stays in the cache is not defined; what was there before does.
            self.truncate(self._length)
            raise FoxEdgeError(
                f"llama.cpp failed with status {status} on {len(tokens)} tokens after "
                f"{self._length}{_complaint()}"
            )
        self._length += len(tokens)
        if not wanted:
            return np.empty((0, self.vocab_size), dtype=np.float32)
        rows = np.ctypeslib.as_array(lib.llama_get_logits(self._context), (wanted, self.vocab_size))
        return rows.copy()
