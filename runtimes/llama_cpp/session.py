"""GGUF artifacts in llama.cpp, through its low-level bindings: tokens in, chosen logits out.

Conversations have a context each (context.py), or, where they are to step together, one in common.
Knows nothing of how the file was made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.errors import ArtifactError, ContextOverflowError, FoxEdgeError, MissingPackageError
from runtimes.base import (
    BatchingSession,
    Logits,
    SessionOptions,
    SharingSession,
    check_tokens,
)
from runtimes.llama_cpp.gguf_model import read_config
from runtimes.memory import MemoryNeed, fitting_context
from runtimes.sampling import Choice, choose

try:
    import llama_cpp.llama_cpp as lib
except ImportError:
    raise MissingPackageError("llama-cpp-python", "gguf") from None

from runtimes.llama_cpp.choices import check_kv_blocks, check_options, shares_a_context
from runtimes.llama_cpp.context import BATCH as BATCH
from runtimes.llama_cpp.context import MOST_CONVERSATIONS, Context, Weights, load_model
from runtimes.llama_cpp.memory import memory_need
from runtimes.llama_cpp.together import rows_that_agree, step

# The KV cache is zeroed when it is made, so every position asked for is memory taken.
DEFAULT_CONTEXT = 4096


class Vocabulary:
    """The vocabulary of a GGUF file as llama.cpp reads it, without the weights."""

    def __init__(self, path: Path) -> None:
        read_config(path)
        self._model: int | None = load_model(path, SessionOptions(), vocab_only=True)
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


class LlamaCppSession:
    """One conversation with a GGUF model; see `runtimes.base.SharingSession`.

    Raises ArtifactError for a damaged file, ContextOverflowError for a context beyond the model's,
    NotEnoughMemoryError, before anything is loaded, when it does not fit in memory. For several conversations
    it is a LlamaCppBatchingSession, unless they are not to step together.
    """

    def __new__(
        cls, artifact: Artifact, options: SessionOptions | None = None, *_: Weights | Context | None
    ) -> LlamaCppSession:
        """The kind of session that the options ask for."""
        together = options is not None and shares_a_context(options)
        return super().__new__(LlamaCppBatchingSession if together else cls)

    def __init__(
        self,
        artifact: Artifact,
        options: SessionOptions | None = None,
        shared: Weights | Context | None = None,
    ) -> None:
        self._context: Context | None = None
        options = options or SessionOptions()
        check_options(options)
        most = artifact.manifest.context
        if options.context is not None and not 1 <= options.context <= most:
            asked = options.context
            raise ContextOverflowError(f"a context of {asked} tokens, but the model has 1 to {most}")
        if shared is None:
            limit = min(most, DEFAULT_CONTEXT) if options.context is None else most
            need = self.need(artifact, options)
            self.context = fitting_context(need, options.context, limit, str(artifact.path))
        else:
            # Conversations that share weights were reckoned with when the first was opened.
            assert options.context is not None
            self.context = options.context
        self._artifact, self._options = artifact, replace(options, context=self.context)
        context = shared if isinstance(shared, Context) else self._open(shared)
        self._sequence, self._context = context.take(), context
        self.vocab_size = context.weights.vocab_size
        self._length = 0

    @staticmethod
    def need(artifact: Artifact, options: SessionOptions) -> MemoryNeed:
        """What it takes to open this, told from headers; raises FoxEdgeError for choices that do not go."""
        check_options(options)
        config = read_config(artifact.model_path)
        check_kv_blocks(options, config)
        if shares_a_context(options) and options.conversations > MOST_CONVERSATIONS:
            raise FoxEdgeError(
                f"{options.conversations} conversations at once, but llama.cpp takes {MOST_CONVERSATIONS}"
            )
        return memory_need(artifact, config, options)

    def _open(self, weights: Weights | None) -> Context:
        """A context of its own, on weights that are loaded already or are loaded now."""
        first, promised = weights is None, self._artifact.manifest.context
        loaded = (weights or Weights(self._artifact.model_path, self._options)).take()
        try:
            if promised > loaded.context:
                raise ArtifactError(
                    f"{self._artifact.path / MANIFEST}: promises a context of {promised}, but the model has "
                    f"{loaded.context}"
                )
            return self._make_context(loaded, first)
        finally:
            loaded.let_go()

    def _make_context(self, weights: Weights, first: bool) -> Context:
        return Context(weights, self.context, self._options, first=first)

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
        return self._last_row(tokens).copy()

    def step(self, token: int) -> Logits:
        """Append one token; logits (vocab,) after it."""
        return self.prefill((token,))

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        """Logits after each of `tokens[start:]`: chunks (n, vocab), n <= SCORE_CHUNK."""
        context = self._check(tokens)
        self._append(context, tokens[:start])
        for first in range(start, len(tokens), context.rows):
            chunk = tokens[first : first + context.rows]
            yield self._decode(context, chunk, len(chunk)).copy()

    def truncate(self, length: int) -> None:
        """Keep only the first `length` cached tokens."""
        self._length = min(self._length, max(0, length))
        if self._context is not None:
            self._context.truncate(self._sequence, self._length)

    def reset(self) -> None:
        """Empty the cache."""
        self.truncate(0)

    def another(self) -> LlamaCppSession:
        """Another conversation, empty, of the same context, on the same weights."""
        return LlamaCppSession(self._artifact, self._options, self._opened.weights)

    def copy_prefix(self, source: SharingSession, length: int) -> None:
        """Hold the first `length` tokens of another conversation."""
        assert isinstance(source, LlamaCppSession) and source is not self
        if source.length < length:
            raise FoxEdgeError(f"{length} tokens cannot be copied from a conversation of {source.length}")
        self.reset()
        if length:
            self._opened.begin_with(self._sequence, source._opened, source._sequence, length)
        self._length = length

    def close(self) -> None:
        """Free the context, and the model with the last one; twice does no harm."""
        context, self._context = self._context, None
        if context is not None:
            context.let_go(self._sequence)

    @property
    def _opened(self) -> Context:
        """The context; raises FoxEdgeError when there is none any more."""
        if self._context is None:
            raise FoxEdgeError("this session is closed")
        return self._context

    def _check(self, tokens: Sequence[int]) -> Context:
        """Refuse what cannot be appended, before the cache is touched."""
        context = self._opened
        check_tokens(self, tokens)
        return context

    def _last_row(self, tokens: Sequence[int]) -> Logits:
        """Append tokens; logits (vocab,) after the last, good until the next pass."""
        context = self._check(tokens)
        last = (len(tokens) - 1) // BATCH * BATCH
        self._append(context, tokens[:last])
        return self._decode(context, tokens[last:], 1)[0]

    def _append(self, context: Context, tokens: Sequence[int]) -> None:
        """Append tokens whose logits nobody reads."""
        for first in range(0, len(tokens), BATCH):
            self._decode(context, tokens[first : first + BATCH], 0)

    def _decode(self, context: Context, tokens: Sequence[int], wanted: int) -> Logits:
        """Append one batch; logits (wanted, vocab) after its last tokens, good until the next pass."""
        count = len(tokens)
        positions = range(self._length, self._length + count)
        try:
            flags = [n >= count - wanted for n in range(count)]
            rows = context.run(tokens, positions, [self._sequence] * count, flags)
        except FoxEdgeError:
            self.truncate(self._length)
            raise
        self._length += count
        return rows


class LlamaCppBatchingSession(LlamaCppSession):
    """A conversation in a context that it has in common with others; see `runtimes.base.BatchingSession`.

    As many as `options.conversations` says can be open at once. So many of them step in one pass as have the
    bits of lone steps then: an answer does not depend on who else is asking. Without `options.fixed_batch`
    there is one pass for all, whatever their bits.
    """

    # What others wait for is this part of a prompt.
    prefill_chunk = 64

    def _make_context(self, weights: Weights, first: bool) -> Context:
        count = self._options.conversations
        context = Context(weights, self.context, self._options, conversations=count)
        if not self._options.fixed_batch:
            context.limit = context.rows
            return context
        # In a thread that ends: OpenMP keeps workers for every thread that ever computed, and lets all of
        # them sleep at every barrier once they are more than the processors. A server's steps, which are
        # another thread's, would take four times as long.
        with ThreadPoolExecutor(1) as looking:
            context.limit = looking.submit(rows_that_agree, context).result()
        return context

    def another(self) -> LlamaCppSession:
        """Another conversation, empty, in the same context; raises FoxEdgeError when all are taken."""
        return LlamaCppBatchingSession(self._artifact, self._options, self._opened)

    @property
    def most_together(self) -> int:
        """Tokens of one pass, at most."""
        return self._opened.limit

    def step_many(
        self,
        conversations: Sequence[BatchingSession],
        tokens: Sequence[int],
        choices: Sequence[Choice | None] | None = None,
    ) -> list[Logits | int]:
        """Append one token to each of several conversations; logits, or the tokens chosen."""
        members = [self._member(conversation) for conversation in conversations]
        for member, token in zip(members, tokens, strict=True):
            member._check((token,))
        sequences = [member._sequence for member in members]
        if len(set(sequences)) < len(sequences):
            raise FoxEdgeError("a conversation can take one step in a pass, and one was named twice")
        results: dict[int, Logits | int] = {}
        try:
            for place, row in step(self._opened, tokens, sequences):
                choice = None if choices is None else choices[place]
                results[place] = row.copy() if choice is None else _chosen(row, choice)
        except FoxEdgeError:
            for member in members:
                member.truncate(member.length)
            raise
        for member in members:
            member._length += 1
        return [results[place] for place in range(len(members))]

    def prefill_choose(self, tokens: Sequence[int], choice: Choice) -> int:
        """Append tokens; the id of the token chosen after the last."""
        return _chosen(self._last_row(tokens), choice)

    def _member(self, conversation: BatchingSession) -> LlamaCppBatchingSession:
        """A conversation of the same context; raises FoxEdgeError for one that is not."""
        if isinstance(conversation, LlamaCppBatchingSession) and conversation._opened is self._opened:
            return conversation
        raise FoxEdgeError("only conversations that were opened together can step together")


def _chosen(row: Logits, choice: Choice) -> int:
    """The token that a choice makes of a row; -1 where it holds no numbers: all else a choice takes."""
    try:
        return choose(row, choice)
    except FoxEdgeError:
        return -1
