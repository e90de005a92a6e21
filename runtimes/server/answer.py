"""The reader of one answer: tokens from the engine's thread become text for an asyncio task.

Finds stop strings, so that the engine ends an answer at the very token. Knows tokenizers and text; not HTTP,
nor OpenAI's shapes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from fox_edge.tokenizer import Tokenizer
from runtimes.generate import Logprobs
from runtimes.server.engine import Outcome
from runtimes.stop_strings import StopStrings


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer as bytes, its log-probability, and the likeliest tokens with theirs.

    `offset`: where it begins, in characters of the answer.
    """

    data: bytes
    logprob: float
    top: list[tuple[bytes, float]]
    offset: int


@dataclass(frozen=True)
class Delta:
    """What an answer grew by. The last one has the outcome."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    outcome: Outcome | None = None


class Answer:
    """An engine's Reader whose deltas are awaited in the event loop that made it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._text, self._stops = tokenizer.stream(), StopStrings(stops)
        self._decoded = self._passed = 0  # characters
        self._pending: list[TokenLogprob] = []
        self._deltas: deque[Delta] = deque()
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()

    def token(self, token: int, logprobs: Logprobs | None) -> bool:
        """On the engine's thread: take a token; False once a stop string is complete."""
        text = self._text.push(token)
        if logprobs is not None:
            top = [(self._bytes(id), value) for id, value in logprobs.top]
            self._pending.append(TokenLogprob(self._bytes(token), logprobs.logprob, top, self._decoded))
        self._decoded += len(text)
        self._pass_on(self._stops.push(text))
        self.stopped = self._stops.found is not None
        return not self.stopped

    def ended(self, outcome: Outcome) -> None:
        """On the engine's thread: the last delta, with what was held back for nothing."""
        rest = "" if self.stopped else self._stops.push(self._text.flush()) + self._stops.flush()
        self._pass_on(rest, outcome)

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What has arrived, as soon as something has; the very last delta has the outcome."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            batch = []
            while self._deltas:
                batch.append(self._deltas.popleft())
            if batch:
                yield batch
            if batch and batch[-1].outcome is not None:
                return

    def _pass_on(self, text: str, outcome: Outcome | None = None) -> None:
        self._passed += len(text)
        # Of tokens that are held back, in part or whole, those that are in the text belong to it.
        ripe = len(self._pending) if outcome is not None and not self.stopped else 0
        while ripe < len(self._pending) and self._pending[ripe].offset < self._passed:
            ripe += 1
        logprobs, self._pending = self._pending[:ripe], self._pending[ripe:]
        if text or logprobs or outcome is not None:
            self._deltas.append(Delta(text, logprobs, outcome))
            # The loop may be gone already when the process ends.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._arrived.set)

    def _bytes(self, token: int) -> bytes:
        """A token's bytes; none for a row of the model that is no piece of the tokenizer."""
        return self._tokenizer.piece_bytes(token) if token < self._tokenizer.vocab_size else b""
