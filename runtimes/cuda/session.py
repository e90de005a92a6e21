"""Conversations with a model on an NVIDIA GPU: a checkpoint in BF16, rounded to int8 or int4, or an artifact.

An artifact's very integers and scales are computed with, so that its answers here are, up to rounding of
activations, those that it gives on a phone. The same code runs on the CPU, slowly, for tests. Knows sessions
and who holds which slot; what is computed, and where, is others' business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ContextOverflowError, FoxEdgeError, NotEnoughMemoryError
from fox_edge.gpu import find_gpu
from fox_edge.progress import say
from runtimes.base import (
    CPU,
    CUDA,
    BatchingSession,
    Logits,
    SessionOptions,
    SharingSession,
    check_choices,
    check_tokens,
)
from runtimes.cuda.decoder import SIZES, size_of
from runtimes.cuda.model import Model, Row
from runtimes.cuda.need import device_room, memory_need, name_of
from runtimes.cuda.sources import open_source
from runtimes.cuda.weights import Ruler, lay_out
from runtimes.memory import MemoryNeed, Room, fitting_context
from runtimes.sampling import Choice

# Tokens of a prompt between two steps of others: on a GPU some 4 ms.
_CUDA_PART, _CPU_PART = 512, 64


class CudaSession:
    """One conversation; see `runtimes.base.BatchingSession`.

    `dtype` is that of floats, activations and the KV cache: bfloat16, float32 in tests. `model` is one that
    is loaded already, which `another` hands on. Raises FoxEdgeError where there is no GPU that can be used,
    NotEnoughMemoryError with the sum before anything is loaded, ContextOverflowError when more positions are
    asked for than the model has.
    """

    # What a checkpoint's matrices are rounded to at load: a preset of the ONNX exporter.
    preset: ClassVar[str | None] = None

    def __init__(
        self,
        source: Checkpoint | Artifact,
        options: SessionOptions | None = None,
        dtype: torch.dtype = torch.bfloat16,
        model: Model | None = None,
    ) -> None:
        options = options or SessionOptions()
        self._model: Model | None = model or self._open(source, options, dtype)
        self._opened = (source, options, dtype)
        self.context = self._model.slots.positions
        self.vocab_size = self._model.config.vocab_size
        self.prefill_chunk = _CUDA_PART if self._model.device.type == CUDA else _CPU_PART
        self._slot, self._length = self._model.slots.take(), 0

    @classmethod
    def need(
        cls, source: Checkpoint | Artifact, options: SessionOptions, dtype: torch.dtype = torch.bfloat16
    ) -> MemoryNeed:
        """What it takes to open this, told from headers."""
        _check(options, dtype)
        weights = open_source(source, cls.preset)
        try:
            return memory_need(weights, options, dtype, options.device or CUDA)
        finally:
            weights.close()

    @classmethod
    def held_bytes(cls, source: Checkpoint | Artifact) -> tuple[int, int]:
        """Bytes on the device of all weights, and of the embedding, which is the head too when tied."""
        weights, ruler = open_source(source, cls.preset), Ruler()
        try:
            laid_out, _ = lay_out(weights, torch.bfloat16, ruler.take)
            return ruler.nbytes, laid_out.embedding.nbytes
        finally:
            weights.close()

    @staticmethod
    def room(options: SessionOptions) -> Room | str | None:
        """Where it would be opened: a GPU's memory, why there is none, or None for the process's own."""
        if options.device == CPU:
            return None
        found = find_gpu()
        return found if isinstance(found, str) else device_room(_current())

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self._length

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append tokens to the cache in chunks; logits (vocab,) after the last, the only row computed."""
        return _row(self._prefill(tokens, None))

    def prefill_choose(self, tokens: Sequence[int], choice: Choice) -> int:
        """Append tokens; the id of the token chosen after the last, -1 where logits are no numbers."""
        return _token(self._prefill(tokens, choice))

    def step(self, token: int) -> Logits:
        """Append one token; logits (vocab,) after it."""
        return _row(self.step_many((self,), (token,))[0])

    def step_many(
        self,
        conversations: Sequence[BatchingSession],
        tokens: Sequence[int],
        choices: Sequence[Choice | None] | None = None,
    ) -> list[Logits | int]:
        """Append one token to each of several conversations on these weights, in one pass over them.

        For each, the logits (vocab,) after it or, where there is a choice, the token chosen. All checks come
        before any work.
        """
        model, rows = self._loaded(), list[Row]()
        if len(conversations) > model.slots.count:
            raise FoxEdgeError(
                f"{len(conversations)} conversations are to take a step, but this model was opened for "
                f"{model.slots.count}"
            )
        for one, token, choice in zip(
            conversations, tokens, choices or [None] * len(conversations), strict=True
        ):
            if not isinstance(one, CudaSession) or one._loaded() is not model:
                raise FoxEdgeError("only conversations on the same weights can take a step together")
            check_tokens(one, (token,))
            rows.append(Row(one._slot, one._length, token, choice))
        if len({row.slot for row in rows}) < len(rows):
            raise FoxEdgeError("a conversation can take only one step at a time")
        found = model.step(rows)
        for one in conversations:
            assert isinstance(one, CudaSession)
            one._length += 1
        return found

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        """Logits after each of `tokens[start:]`: chunks (n, vocab), n <= SCORE_CHUNK."""
        model, past = self._loaded(), self._length
        check_tokens(self, tokens)
        return self._score(model, list(tokens), past, start)

    def truncate(self, length: int) -> None:
        """Keep only the first `length` cached tokens."""
        self._length = min(self._length, max(0, length))

    def reset(self) -> None:
        """Empty the cache."""
        self._length = 0

    def another(self) -> CudaSession:
        """Another conversation, empty, on the same weights; raises FoxEdgeError when all slots are taken."""
        source, options, dtype = self._opened
        return type(self)(source, options, dtype, self._loaded())

    def copy_prefix(self, source: SharingSession, length: int) -> None:
        """Hold the first `length` tokens of another conversation on the same weights."""
        model = self._loaded()
        assert isinstance(source, CudaSession) and source is not self and source._loaded() is model
        if source.length < length:
            raise FoxEdgeError(f"{length} tokens cannot be copied from a conversation of {source.length}")
        model.copy(source._slot, self._slot, length)
        self._length = length

    def close(self) -> None:
        """Give the slot back; with the last conversation, let go of the model."""
        if self._model is None:
            return
        model, self._model = self._model, None
        if model.slots.give_back(self._slot) and model.device.type == CUDA:
            del model
            torch.cuda.empty_cache()

    def _open(self, source: Checkpoint | Artifact, options: SessionOptions, dtype: torch.dtype) -> Model:
        """Load a model, after everything that can be refused was."""
        _check(options, dtype)
        weights = open_source(source, self.preset)
        try:
            device = _device(options, weights.name)
            most = weights.context
            if options.context is not None and not 0 < options.context <= most:
                raise ContextOverflowError(
                    f"a context of {options.context} positions was asked for, but 1 to {most} exist"
                )
            need = memory_need(weights, options, dtype, device.type)
            room = device_room(device) if device.type == CUDA else None
            context = fitting_context(need, options.context, most, weights.name, room)
            for note in weights.notes():
                say(f"note: {note}")
            fixed = size_of(min(options.conversations, SIZES[-1])) if options.fixed_batch else None
            try:
                return Model(weights, options.conversations, context, dtype, device, fixed)
            except torch.OutOfMemoryError:
                raise NotEnoughMemoryError(
                    f"{weights.name}: the GPU's memory was taken by others while the model was loaded: "
                    f"{device_room(device).words}"
                ) from None
        finally:
            weights.close()

    def _loaded(self) -> Model:
        if self._model is None:
            raise FoxEdgeError("this session is closed")
        return self._model

    def _prefill(self, tokens: Sequence[int], choice: Choice | None) -> Logits | int:
        if len(tokens) == 1:
            return self.step_many((self,), tokens, (choice,))[0]
        model = self._loaded()
        check_tokens(self, tokens)
        found = model.prefill(tokens, self._slot, self._length, choice)
        self._length += len(tokens)
        return found

    def _score(self, model: Model, tokens: list[int], past: int, start: int) -> Iterator[Logits]:
        for done, hidden in model.score(tokens, self._slot, past):
            self._length = past + done
            yield from model.logits(hidden[max(0, start - (done - len(hidden))) :])


class CudaInt8Session(CudaSession):
    """A checkpoint rounded to int8 at load."""

    preset = "int8"


class CudaInt4Session(CudaSession):
    """A checkpoint rounded to int4 at load."""

    preset = "int4"


def _check(options: SessionOptions, dtype: torch.dtype) -> None:
    check_choices(options, "the CUDA runtime", (name_of(dtype),), devices=(CUDA, CPU))
    if options.conversations < 1:
        raise FoxEdgeError(f"{options.conversations} conversations were asked for, but at least 1 is due")


def _device(options: SessionOptions, what: str) -> torch.device:
    """The GPU, or the CPU where it was asked for; raises FoxEdgeError with what was found instead."""
    if options.device == CPU:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return torch.device(CPU)
    found = find_gpu()
    if isinstance(found, str):
        raise FoxEdgeError(f"{what} cannot be opened on a GPU: {found}")
    return _current()


def _current() -> torch.device:
    return torch.device(CUDA, torch.cuda.current_device())


def _row(found: Logits | int) -> Logits:
    assert not isinstance(found, int)
    return found


def _token(found: Logits | int) -> int:
    assert isinstance(found, int)
    return found
