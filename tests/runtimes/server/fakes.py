"""A model whose next token is a function of all tokens before it: what is mixed up or left over shows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtimes.generate import Logprobs
from runtimes.sampling import Choice, choose
from runtimes.server.engine import Engine, Job, Outcome

VOCAB = 97
STOP = 0


def next_token(tokens: Sequence[int]) -> int:
    """The token that the fake model goes on with; never STOP."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 100_003
    return 1 + value % (VOCAB - 1)


def answer_alone(prompt: Sequence[int], count: int) -> list[int]:
    """What the model says when nobody else asks."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class Family:
    """What sessions on the same weights share, and what happened to them, in order."""

    calls: list[tuple[int, str, int]] = field(default_factory=list)  # session, what, tokens
    open: int = 0
    sessions: int = 0
    on_call: Callable[[int, list[int]], None] | None = None
    choices: list[list[Choice | None]] = field(default_factory=list)  # of every pass for several


class FakeSession:
    """See `runtimes.base.SharingSession`."""

    def __init__(self, context: int = 1000, family: Family | None = None) -> None:
        self.context, self.vocab_size = context, VOCAB
        self.family = family or Family()
        self.number = self.family.sessions
        self.family.sessions += 1
        self.family.open += 1
        self.tokens: list[int] = []
        self.closed = False

    @property
    def length(self) -> int:
        return len(self.tokens)

    def prefill(self, tokens):
        return self._run("prefill", list(tokens))

    def step(self, token):
        return self._run("step", [token])

    def _run(self, what, tokens):
        assert not self.closed and tokens and len(self.tokens) + len(tokens) <= self.context
        self.family.calls.append((self.number, what, len(tokens)))
        if self.family.on_call is not None:
            self.family.on_call(self.number, tokens)
        self.tokens += tokens
        logits = np.zeros(VOCAB, np.float32)
        logits[next_token(self.tokens)] = 9.0
        return logits

    def score(self, tokens, start=0):
        raise NotImplementedError

    def truncate(self, length):
        del self.tokens[length:]

    def reset(self):
        self.truncate(0)

    def another(self):
        return FakeSession(self.context, self.family)

    def copy_prefix(self, source, length):
        assert source.family is self.family and length <= source.length
        self.family.calls.append((self.number, f"copy from {source.number}", length))
        self.tokens = source.tokens[:length]

    def close(self):
        assert not self.closed
        self.closed = True
        self.family.open -= 1


class BatchingFake(FakeSession):
    """See `runtimes.base.BatchingSession`: a pass for several is noted as one call of `step_many`."""

    prefill_chunk = 16

    def step_many(self, conversations, tokens, choices=None):
        choices = choices or [None] * len(tokens)
        held = [conversation.length for conversation in conversations]
        assert len({conversation.number for conversation in conversations}) == len(conversations)
        calls, self.family.calls = self.family.calls, []
        try:
            rows = [c.step(t) for c, t in zip(conversations, tokens, strict=True)]
        except BaseException:
            for conversation, length in zip(conversations, held, strict=True):
                conversation.truncate(length)
            raise
        finally:
            calls.append((self.number, "step_many", len(tokens)))
            self.family.calls = calls
        self.family.choices.append(list(choices))
        return [r if c is None else choose(r, c) for r, c in zip(rows, choices, strict=True)]

    def prefill_choose(self, tokens, choice):
        return choose(self.prefill(tokens), choice)

    def another(self):
        return BatchingFake(self.context, self.family)


class Listener:
    """A Reader that remembers; `log` is shared by several, to see who got a token when."""

    def __init__(self, name: str = "", log: list[str] | None = None) -> None:
        self.name, self.log = name, log if log is not None else []
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs | None] = []
        self.outcomes: list[Outcome] = []
        self.over = threading.Event()
        self.on_token: Callable[[Listener], bool | None] | None = None

    def token(self, token: int, logprobs: Logprobs | None) -> bool:
        assert not self.outcomes
        self.tokens.append(token)
        self.logprobs.append(logprobs)
        self.log.append(self.name)
        return self.on_token is None or self.on_token(self) is not False

    def ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.over.set()

    @property
    def outcome(self) -> Outcome:
        assert self.over.wait(20), f"{self.name} was never told of an end"
        (outcome,) = self.outcomes
        return outcome


def ask(
    engine: Engine,
    prompt: Sequence[int],
    count: int = 5,
    listener: Listener | None = None,
    timeout_s: float | None = None,
    **fields: Any,
) -> tuple[Listener, Job]:
    """Submit a job for so many tokens."""
    listener = listener or Listener()
    job = Job(list(prompt), listener, stop_ids={STOP}, max_tokens=count, timeout_s=timeout_s, **fields)
    engine.submit(job)
    return listener, job
