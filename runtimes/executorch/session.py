"""A .pte artifact as a session: ExecuTorch on the CPU, keys and values kept by the program itself.

Knows the methods `forward` (logits of the last row) and `score` (of every row), and that both overwrite the
cache from the position that they are given: forgetting is a smaller number. Does not know how the artifact
was made, nor what tokens mean.

The program has one cache. Several conversations on the same weights take turns in it: who was there before
takes a copy of its own part along, and brings it back when it comes again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.artifact import Artifact
from fox_edge.errors import ContextOverflowError, FoxEdgeError
from fox_edge.processors import physical_cores
from runtimes.base import Logits, SessionOptions, SharingSession, check_choices, check_tokens
from runtimes.executorch.engine import Engine
from runtimes.executorch.program import FORWARD, SCORE, FoxProgram, read_artifact_program
from runtimes.memory import MemoryNeed, fitting_context

# Matrices (chunk, widest) of float32 that live at once in XNNPACK's workspace.
_ACTIVATIONS = 3
# What ExecuTorch takes of its own once it runs, beside its packages.
_FIXED = 12_000_000


@dataclass
class _Shared:
    """What conversations on the same weights have together, and whose tokens are in the cache now."""

    engine: Engine
    program: FoxProgram
    users: int = 1
    holder: PteSession | None = None
    caches: dict[str, NDArray[Any]] = field(default_factory=dict)


class PteSession:
    """One conversation with a .pte artifact; see `runtimes.base.Session`.

    Raises ArtifactError for a damaged program, ContextOverflowError when more positions are asked for than
    it was exported for, NotEnoughMemoryError, before anything is loaded, when it does not fit in memory.
    """

    def __init__(self, artifact: Artifact, options: SessionOptions | None = None) -> None:
        options = options or SessionOptions()
        program = read_artifact_program(artifact)
        _check_options(options, program)
        limit = program.context
        if options.context is not None and not 0 < options.context <= limit:
            raise ContextOverflowError(
                f"a context of {options.context} positions was asked for; this artifact was exported for "
                f"1 to {limit}"
            )
        need = memory_need(program, options)
        # The cache is as long as it was exported: less of it takes no less memory.
        fitting_context(need, options.context, limit, str(artifact.path))
        engine = Engine(artifact.model_path, options.threads or physical_cores())
        try:
            engine.use(FORWARD)
        except BaseException:
            engine.close()
            raise
        self._begin(_Shared(engine, program), options.context or limit)

    def _begin(self, shared: _Shared, context: int) -> None:
        """An empty conversation on loaded weights."""
        self.context, self.length = context, 0
        self.vocab_size = shared.program.vocab_size
        self._shared: _Shared | None = shared
        self._kept: dict[str, NDArray[Any]] = {}

    @staticmethod
    def need(artifact: Artifact, options: SessionOptions) -> MemoryNeed:
        """What it takes to open this, told from headers; raises FoxEdgeError for choices that do not go."""
        program = read_artifact_program(artifact)
        _check_options(options, program)
        return memory_need(program, options)

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append tokens to the cache in chunks; logits (vocab,) after the last."""
        ids = self._check(tokens)
        logits = self._append(ids)
        return (logits if logits.ndim == 1 else logits[-1]).copy()

    def step(self, token: int) -> Logits:
        """Append one token; logits (vocab,) after it."""
        return self.prefill((token,))

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        """Logits after each of `tokens[start:]`: chunks (n, vocab), n <= SCORE_CHUNK."""
        return self._score(self._check(tokens), start)

    def _score(self, ids: NDArray[np.int64], start: int) -> Iterator[Logits]:
        """`score` after its checks, which come with the call and not with the first row."""
        if start > 0:
            self._append(ids[:start])
        rows, step = ids[start:], self._open.program.score_chunk
        for first in range(0, len(rows), step):
            yield self._run(SCORE, rows[first : first + step]).copy()

    def truncate(self, length: int) -> None:
        """Keep only the first `length` cached tokens."""
        self.length = min(self.length, max(0, length))

    def reset(self) -> None:
        """Empty the cache."""
        self.truncate(0)

    def another(self) -> PteSession:
        """Another conversation, empty, of the same context, on the same weights."""
        shared = self._open
        other = PteSession.__new__(PteSession)
        other._begin(shared, self.context)
        shared.users += 1
        return other

    def copy_prefix(self, source: SharingSession, length: int) -> None:
        """Hold the first `length` tokens of another conversation on the same weights."""
        assert isinstance(source, PteSession) and source is not self and source._shared is self._shared
        if source.length < length:
            raise FoxEdgeError(f"{length} tokens cannot be copied from a conversation of {source.length}")
        shared = self._open
        if shared.holder is self:
            shared.holder = None
        held = shared.caches if shared.holder is source else source._kept
        self._kept = {name: cache[:, :length].copy() for name, cache in held.items()}
        self.length = length

    def close(self) -> None:
        """Free this conversation, and the model with the last of them."""
        shared, self._shared = self._shared, None
        self._kept = {}
        if shared is None:
            return
        if shared.holder is self:
            shared.holder = None
        shared.users -= 1
        if shared.users == 0:
            shared.caches = {}
            shared.engine.close()

    @property
    def _open(self) -> _Shared:
        if self._shared is None:
            raise FoxEdgeError("this session is closed")
        return self._shared

    def _check(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """The tokens as an array, once it is sure that they can be appended."""
        self._open  # noqa: B018 (raises when closed)
        check_tokens(self, tokens)
        return np.asarray(tokens, np.int64)

    def _append(self, ids: NDArray[np.int64]) -> Logits:
        """Append tokens in chunks by the method that is loaded: `forward`, unless rows were asked for."""
        shared = self._open
        name = shared.engine.loaded
        step = shared.program.chunk if name == FORWARD else shared.program.score_chunk
        for first in range(0, len(ids), step):
            logits = self._run(name, ids[first : first + step])
        return logits

    def _take_turn(self, name: str) -> None:
        """Load a method and have this conversation's tokens in its cache."""
        shared = self._open
        shared.engine.use(name)
        if not shared.caches:
            shared.caches = {cache: shared.engine.buffer(cache) for cache in shared.program.caches}
        before = shared.holder
        if before is self:
            return
        if before is not None and before.length:
            before._kept = {n: cache[:, : before.length].copy() for n, cache in shared.caches.items()}
        for cache, kept in self._kept.items():
            shared.caches[cache][:, : self.length] = kept[:, : self.length]
        self._kept, shared.holder = {}, self

    def _run(self, name: str, ids: NDArray[np.int64]) -> Logits:
        """Append a chunk; what the method says of it, valid until the next run."""
        if self._open.holder is not self or self._open.engine.loaded != name:
            self._take_turn(name)
        logits = self._open.engine.run(ids, self.length)
        self.length += len(ids)
        return logits


def _check_options(options: SessionOptions, program: FoxProgram) -> None:
    """Raises FoxEdgeError for choices that ExecuTorch does not have."""
    check_choices(options, "this .pte", (program.kv,))


def memory_need(program: FoxProgram, options: SessionOptions) -> MemoryNeed:
    """What a session takes to generate: packed weights, planned arenas, buffers, and the whole cache.

    `forward` is reckoned with, as for a chat.
    """
    config = program.config
    widest = max(config.hidden_size, 2 * config.intermediate_size)
    return MemoryNeed(
        weights=program.packed_bytes,
        buffers=_FIXED
        + program.planned_bytes
        + 4 * (_ACTIVATIONS * program.chunk * widest + config.vocab_size),
        per_position=options.conversations * program.cache_bytes // program.context,
        step=program.context,
    )
