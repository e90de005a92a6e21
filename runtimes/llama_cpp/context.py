"""llama.cpp's contexts: KV caches for one conversation or several, and the passes that fill them.

Tokens in, rows of logits out; only rows that someone reads exist: the buffers of the package's own `Llama`
class (a row per batch or context position, gigabytes with Fox's 256,000 pieces) are not used. Knows
llama.cpp's models, batches and sequences; not artifacts, nor what a token is chosen by.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from fox_edge.errors import ArtifactError, FoxEdgeError
from runtimes.base import SCORE_CHUNK, Logits, SessionOptions
from runtimes.llama_cpp.choices import choose_for_context, choose_for_model, for_sharing

# Tokens of a prompt that run at once.
BATCH = 512
# Of these, where several conversations wait for one another; attention's scores are held for so many at once.
SHARED_BATCH = 128
# llama.cpp makes room for positions in steps of so many.
CONTEXT_STEP = 256
# Sequences that one context can tell apart (LLAMA_MAX_SEQ).
MOST_CONVERSATIONS = 256
# Rows of logits that a further context on the same weights can have at once: 16 x 256,000 float32 are 16 MB,
# and its compute buffer has them twice.
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


def load_model(path: Path, options: SessionOptions, *, vocab_only: bool = False) -> int:
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


class Weights:
    """A loaded model that several contexts may use; freed when the last one lets go."""

    def __init__(self, path: Path, options: SessionOptions) -> None:
        self.path, self.model = path, load_model(path, options)
        self.vocab_size = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model)))
        self.context = int(lib.llama_model_n_ctx_train(self.model))
        self._users = 0

    def take(self) -> Weights:
        """Count one more user."""
        self._users += 1
        return self

    def let_go(self) -> None:
        """Count one user less."""
        self._users -= 1
        if self._users <= 0:
            lib.llama_model_free(self.model)


class Context:
    """The KV cache of one conversation or several, of at most `positions` tokens each, and buffers for all.

    Several are sequences numbered from 0, each in cells of its own, so that attention sums for each as it
    would alone. What is known of a sequence, its length, is its user's business too. `limit` is how many
    may have a token in one pass (together.py). Freed when the last user lets go.
    """

    def __init__(
        self,
        weights: Weights,
        positions: int,
        options: SessionOptions,
        *,
        conversations: int = 1,
        first: bool = True,
    ) -> None:
        self.weights = weights.take()
        self._handle: int | None = None
        self.conversations, self.limit = conversations, 1
        self.rows = SCORE_CHUNK if first else _FURTHER_ROWS
        self.cells = -(-positions // CONTEXT_STEP) * CONTEXT_STEP
        try:
            self._handle = self._open(positions, options)
        except BaseException:
            weights.let_go()
            raise
        self._memory = lib.llama_get_memory(self._handle)
        self._batch = _Batch(BATCH)
        self._free = list(range(conversations))
        self._users = 0

    def _open(self, positions: int, options: SessionOptions) -> int:
        params = lib.llama_context_default_params()
        params.n_batch = params.n_ubatch = BATCH
        # Without these the compute buffer is made for a row of logits per batch token: 524 MB for Fox.
        params.n_outputs_max = params.n_outputs_max_per_seq = self.rows
        if self.conversations == 1:
            # A second sequence in the same cells, by which a prefix is picked that another context gets.
            params.n_ctx, params.n_seq_max, params.kv_unified = positions, 2, True
        else:
            params.n_ctx, params.n_seq_max = self.conversations * self.cells, self.conversations
            params.n_ubatch, params.kv_unified = SHARED_BATCH, False
            options = for_sharing(options)
        choose_for_context(params, options)
        _errors.clear()
        handle = lib.llama_init_from_model(self.weights.model, params)
        if not handle:
            several = f" for each of {self.conversations} conversations" if self.conversations > 1 else ""
            raise FoxEdgeError(
                f"{self.weights.path}: llama.cpp cannot make a context of {positions} tokens{several}"
                f"{_complaint()}"
            )
        return int(handle)

    def take(self) -> int:
        """The number of a sequence that nobody has, empty; raises FoxEdgeError when all are taken."""
        if not self._free:
            raise FoxEdgeError(
                f"this model was opened for {self.conversations} conversations at once, and all are taken"
            )
        self._users += 1
        return self._free.pop(0)

    def let_go(self, sequence: int) -> None:
        """Give a sequence back; with the last one the context is freed, and so may be the weights."""
        self._users -= 1
        if self._users > 0:
            self.truncate(sequence, 0)
            self._free.append(sequence)
            return
        lib.llama_free(self._handle)
        self.weights.let_go()

    def run(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> Logits:
        """One pass over at most BATCH tokens: the logits (n, vocab) after those of them that are wanted.

        They are llama.cpp's own, good until the next pass. Raises FoxEdgeError when it fails: what part of
        the tokens stays in the cache is then not defined, what was there before does.
        """
        _errors.clear()
        status = lib.llama_decode(self._handle, self._batch.fill(tokens, positions, sequences, wanted))
        if status != 0:
            raise FoxEdgeError(
                f"llama.cpp failed with status {status} on {len(tokens)} tokens after {positions[0]}"
                f"{_complaint()}"
            )
        count = sum(wanted)
        if not count:
            return np.empty((0, self.weights.vocab_size), dtype=np.float32)
        return np.ctypeslib.as_array(lib.llama_get_logits(self._handle), (count, self.weights.vocab_size))

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return int(lib.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def truncate(self, sequence: int, length: int) -> None:
        """Keep only the first `length` tokens of a sequence."""
        lib.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def begin_with(self, sequence: int, source: Context, other: int, length: int) -> None:
        """Copy the first tokens of a sequence, of any context on these weights, into an empty one of this.

        Through llama.cpp's saved state, bit by bit. Raises FoxEdgeError.
        """
        written, state = source._saved(other, length)
        if not written or not lib.llama_state_seq_set_data(self._handle, state, written, sequence):
            self.truncate(sequence, 0)
            raise FoxEdgeError(f"llama.cpp cannot copy {length} tokens of a conversation{_complaint()}")
        self.truncate(sequence, length)

    def _saved(self, sequence: int, length: int) -> tuple[int, Any]:
        """The state of a sequence, and its size; of its first tokens alone where that can be told apart."""
        spare = sequence
        if self.conversations == 1:
            spare = sequence + 1
            lib.llama_memory_seq_cp(self._memory, sequence, spare, 0, length)
        try:
            size = lib.llama_state_seq_get_size(self._handle, spare)
            state = (ctypes.c_uint8 * size)()
            return lib.llama_state_seq_get_data(self._handle, state, size, spare), state
        finally:
            if spare != sequence:
                self.truncate(spare, 0)


class _Batch:
    """The arrays of one `llama_decode`, made once."""

    def __init__(self, size: int) -> None:
        self._tokens, self._positions = (ctypes.c_int32 * size)(), (ctypes.c_int32 * size)()
        self._sequences = (ctypes.c_int32 * size)()
        self._wanted = (ctypes.c_int8 * size)()
        # Each token belongs to one sequence.
        self._ones = (ctypes.c_int32 * size)(*([1] * size))
        pointer = ctypes.POINTER(ctypes.c_int32)
        first, width = ctypes.addressof(self._sequences), ctypes.sizeof(ctypes.c_int32)
        self._pointers = (pointer * size)(*(ctypes.cast(first + n * width, pointer) for n in range(size)))
        self._struct = lib.llama_batch(
            n_tokens=0,
            token=ctypes.cast(self._tokens, pointer),
            pos=ctypes.cast(self._positions, pointer),
            n_seq_id=ctypes.cast(self._ones, pointer),
            seq_id=ctypes.cast(self._pointers, ctypes.POINTER(pointer)),
            logits=ctypes.cast(self._wanted, ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> Any:
        """Put tokens in; logits are computed for the wanted ones."""
        count = len(tokens)
        # int(): a numpy integer is no integer to ctypes.
        self._tokens[:count] = [int(token) for token in tokens]
        self._positions[:count] = list(positions)
        self._sequences[:count] = list(sequences)
        flags: list[ctypes.c_int8 | int] = [int(flag) for flag in wanted]
        self._wanted[:count] = flags
        self._struct.n_tokens = count
        return self._struct
