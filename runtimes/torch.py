"""The reference model as a session: a checkpoint run by PyTorch, on the CPU or on CUDA alike.

Knows torch and the reference model. Does not know artifacts: it opens a checkpoint, as the thing that
exports are compared with, and as a runtime of its own (bfloat16) in the benchmark.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fox_edge.errors import ContextOverflowError, FoxEdgeError
from fox_edge.model import Fox, KVCache
from runtimes.base import SCORE_CHUNK, Logits, SessionOptions, SharingSession, check_choices, check_tokens
from runtimes.kv_types import TORCH, kv_bytes_per_position
from runtimes.memory import MemoryNeed, fitting_context

if TYPE_CHECKING:
    from fox_edge.checkpoint import Checkpoint
    from fox_edge.config import FoxConfig

# Tokens of a prompt that run at once: bounds the attention mask and activations, costs no speed.
PREFILL_CHUNK = 512
# What loading holds of the checkpoint's file at a time.
_READ_BYTES = 32 << 20


class TorchSession:
    """One conversation with the reference model; see `runtimes.base.Session`.

    `dtype` is that of weights and KV cache (float32 or bfloat16); logits are always float32 numpy.
    `model` are weights that are loaded already, which `another` hands on.
    Raises ContextOverflowError when more positions are asked for than the model has.
    """

    def __init__(
        self,
        source: Checkpoint,
        options: SessionOptions | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        model: Fox | None = None,
    ) -> None:
        options = options or SessionOptions()
        check_choices(options, "PyTorch", (_name(dtype),))
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        config = source.config
        most = config.max_positions
        if options.context is not None and not 0 < options.context <= most:
            raise ContextOverflowError(
                f"a context of {options.context} positions was asked for, but 1 to {most} exist"
            )
        self.context = most if options.context is None else options.context
        # Conversations that share weights were reckoned with when the first was opened.
        if device == "cpu" and model is None:
            need = self.need(source, options, dtype)
            self.context = fitting_context(need, options.context, most, "the checkpoint in PyTorch")
        self.vocab_size = config.vocab_size
        self._cache = KVCache(config, positions=self.context, dtype=dtype, device=_device(device))
        self._device = self._cache.keys.device
        self._opened = (source, replace(options, context=self.context), dtype, device)
        self._model: Fox | None = model or source.load_model(dtype=dtype, device=device).eval()

    @staticmethod
    def need(source: Checkpoint, options: SessionOptions, dtype: torch.dtype = torch.bfloat16) -> MemoryNeed:
        """What it takes to open this on the CPU, told from headers."""
        check_choices(options, "PyTorch", (_name(dtype),))
        weights = dtype.itemsize * source.config.num_parameters()
        return MemoryNeed(
            weights=weights,
            buffers=_buffers(source.config) + min(_READ_BYTES, weights),
            per_position=options.conversations * kv_bytes_per_position(source.config, TORCH, _name(dtype)),
        )

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self._cache.length

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append tokens to the cache in chunks; logits (vocab,) after the last, the only row computed."""
        (hidden,) = deque(self._run(tokens, PREFILL_CHUNK), maxlen=1)
        return self._logits(hidden[-1])

    def step(self, token: int) -> Logits:
        """Append one token; logits (vocab,) after it."""
        return self.prefill((token,))

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        """Logits after each of `tokens[start:]`: chunks (n, vocab), n <= SCORE_CHUNK."""
        done = 0
        for hidden in self._run(tokens, SCORE_CHUNK):
            wanted = hidden[max(0, start - done) :]
            done += hidden.shape[0]
            if wanted.shape[0]:
                yield self._logits(wanted)

    def truncate(self, length: int) -> None:
        """Keep only the first `length` cached tokens."""
        self._cache.truncate(max(0, length))

    def reset(self) -> None:
        """Empty the cache."""
        self._cache.truncate(0)

    def another(self) -> TorchSession:
        """Another conversation, empty, of the same context, on the same weights."""
        if self._model is None:
            raise FoxEdgeError("this session is closed")
        return TorchSession(*self._opened, model=self._model)

    def copy_prefix(self, source: SharingSession, length: int) -> None:
        """Hold the first `length` tokens of another conversation on the same weights."""
        assert isinstance(source, TorchSession) and source is not self
        if source.length < length:
            raise FoxEdgeError(f"{length} tokens cannot be copied from a conversation of {source.length}")
        held, other = self._cache, source._cache
        for mine, theirs in ((held.keys, other.keys), (held.values, other.values)):
            mine[..., :length, :] = theirs[..., :length, :]
        held.length = length

    def close(self) -> None:
        """Let go of weights and cache."""
        self._model = None
        self._cache.keys = self._cache.values = torch.empty(0)

    def _run(self, tokens: Sequence[int], chunk: int) -> Iterator[Tensor]:
        """Final hidden states (n, C), n <= chunk, of the tokens in order; all checks come before any work."""
        if self._model is None:
            raise FoxEdgeError("this session is closed")
        check_tokens(self, tokens)
        ids = torch.tensor(list(tokens), dtype=torch.long, device=self._device)[None]
        for first in range(0, len(tokens), chunk):
            with torch.inference_mode():
                hidden = self._model.hidden(ids[:, first : first + chunk], self._cache)[0]
            yield hidden

    def _logits(self, hidden: Tensor) -> Logits:
        """Hidden states (..., C) -> float32 numpy logits (..., V)."""
        assert self._model is not None
        with torch.inference_mode():
            logits = self._model.logits(hidden).float().cpu().numpy()
        return np.ascontiguousarray(logits)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _buffers(config: FoxConfig) -> int:
    """Bytes of a chunk's intermediate results and a row of logits."""
    widest = 4 * config.hidden_size + 3 * config.intermediate_size
    return 4 * (PREFILL_CHUNK * widest + config.vocab_size)


def _device(name: str) -> torch.device:
    """The torch device of this name; raises FoxEdgeError when there is none here."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise FoxEdgeError(f"device '{name}' was asked for, but PyTorch sees no CUDA device here")
    try:
        return torch.device(name)
    except RuntimeError:
        raise FoxEdgeError(f"unknown device '{name}'; known: cpu, cuda") from None
