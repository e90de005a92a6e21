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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.errors import ArtifactError, ContextOverflowError, FoxEdgeError, MissingPackageError
from fox_edge.processors import physical_cores
from runtimes.base import SCORE_CHUNK, Logits, SessionOptions, check_tokens, refuse_onnx_choices
from runtimes.gguf_model import read_config

try:
    import llama_cpp.llama_cpp as lib
except ImportError:
    raise MissingPackageError("llama-cpp-python", "gguf") from None

# Tokens of a prompt that run at once.
BATCH = 512
# The KV cache is zeroed when it is made, so every position asked for is memory taken.
DEFAULT_CONTEXT = 4096
_SEQUENCE = 0
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


def _load_model(path: Path, *, vocab_only: bool) -> int:
    """Open a GGUF file, whose header is looked at first; raises ArtifactError."""
    read_config(path)
    _start()
    _errors.clear()
    params = lib.llama_model_default_params()
    params.vocab_only = vocab_only
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ArtifactError(f"{path}: llama.cpp cannot open it{_complaint()}")
    return int(model)


class Vocabulary:
    """The vocabulary of a GGUF file as llama.cpp reads it, without the weights."""

    def __init__(self, path: Path) -> None:
        self._model: int | None = _load_model(path, vocab_only=True)
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


class LlamaCppSession:
    """One conversation with a GGUF model; see `runtimes.base.Session`.

    Raises ArtifactError for a damaged file, ContextOverflowError for a context beyond the model's.
    """

    def __init__(self, artifact: Artifact, options: SessionOptions | None = None) -> None:
        self._model: int | None = None
        self._context: int | None = None
        options = options or SessionOptions()
        refuse_onnx_choices(options, "llama.cpp")
        most = artifact.manifest.context
        self.context = min(most, DEFAULT_CONTEXT) if options.context is None else options.context
        if not 1 <= self.context <= most:
            raise ContextOverflowError(f"a context of {self.context} tokens, but the model has 1 to {most}")
        self._model = _load_model(artifact.model_path, vocab_only=False)
        try:
            self.vocab_size = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))
            trained = int(lib.llama_model_n_ctx_train(self._model))
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

    def _open_context(self, path: Path, options: SessionOptions) -> int:
        params = lib.llama_context_default_params()
        params.n_ctx = self.context
        params.n_batch = params.n_ubatch = BATCH
        # Without these the compute buffer is made for a row of logits per batch token: 524 MB for Fox.
        params.n_outputs_max = params.n_outputs_max_per_seq = SCORE_CHUNK
        params.n_threads = params.n_threads_batch = options.threads or physical_cores()
        context = lib.llama_init_from_model(self._model, params)
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
        for first in range(start, len(tokens), SCORE_CHUNK):
            chunk = tokens[first : first + SCORE_CHUNK]
            yield self._decode(chunk, len(chunk))

    def truncate(self, length: int) -> None:
        """Keep only the first `length` cached tokens."""
        self._length = min(self._length, max(0, length))
        if self._context is not None:
            lib.llama_memory_seq_rm(self._memory, _SEQUENCE, self._length, -1)

    def reset(self) -> None:
        """Empty the cache."""
        self.truncate(0)

    def close(self) -> None:
        """Free the model; twice does no harm."""
        if self._context is not None:
            lib.llama_free(self._context)
            self._context = None
        if self._model is not None:
            lib.llama_model_free(self._model)
            self._model = None

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
