"""Several users at once on the same weights: who is served when, and what the clock says of each.

All ask at the same time, and again as soon as they were answered. Tokens come as `fox-edge serve` deals them
out: every round, each answer that has begun gets one token, and one prompt that was not read yet gets a part
run, another one's in the next round. Knows sessions, tokens and a clock; not figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fox_edge.errors import FoxEdgeError
from runtimes.base import Logits, Session, SharingSession
from runtimes.generate import GREEDY, pick

Clock = Callable[[], float]
# Tokens of a prompt that run at once, while others wait for their next token: as the server does it.
CHUNK = 64


@dataclass(frozen=True)
class Turn:
    """What the clock said of one prompt and its answer.

    `prompt_tokens` were computed, in `prompt_s`: what the cache held already is not among them. `stamps_s`
    are the times at which each token of the answer was there; the first one comes of the prompt.
    """

    prompt_tokens: int
    asked_s: float
    prompt_s: float
    stamps_s: Sequence[float]


def open_users(session: Session, users: int, runtime: str) -> list[Session]:
    """The session, and further ones on its weights; raises FoxEdgeError where there can be no others."""
    if users == 1:
        return [session]
    if not isinstance(session, SharingSession):
        raise FoxEdgeError(
            f"{users} users need {users} conversations on the same weights, and {runtime}, opened like this, "
            f"has one; measure with --users 1 (and without --speculate)"
        )
    return [session, *(session.another() for _ in range(users - 1))]


def time_conversation(
    session: Session,
    turns: Sequence[Sequence[int]],
    decode_tokens: int,
    clock: Clock = time.perf_counter,
) -> list[Turn]:
    """One user, from an empty cache: each turn runs its own tokens, and the last of the answer before it."""
    session.reset()
    found = []
    kept: list[int] = []
    for tokens in turns:
        turn, token = time_turn(session, [*kept, *tokens], decode_tokens, clock)
        found.append(turn)
        kept = [token]
    return found


def time_turn(
    session: Session, prompt: Sequence[int], decode_tokens: int, clock: Clock = time.perf_counter
) -> tuple[Turn, int]:
    """Run a prompt and decode so many tokens after the first; the last one is not in the cache yet."""
    rng = GREEDY.rng()
    stamps = [0.0] * (decode_tokens + 1)
    asked = clock()
    logits = session.prefill(prompt)
    read = clock()
    token = pick(logits, GREEDY, rng)
    stamps[0] = clock()
    for n in range(1, decode_tokens + 1):
        token = pick(session.step(token), GREEDY, rng)
        stamps[n] = clock()
    return Turn(len(prompt), asked, read - asked, stamps), token


def time_users(
    sessions: Sequence[Session],
    conversations: Sequence[Sequence[Sequence[int]]],
    decode_tokens: int,
    clock: Clock = time.perf_counter,
) -> list[Turn]:
    """One conversation in each session, all at once; all turns of all of them."""
    users = [
        _User(session, turns, decode_tokens, clock)
        for session, turns in zip(sessions, conversations, strict=True)
    ]
    for user in users:
        user.session.reset()
    for user in users:
        user.ask()
    rounds = 0
    while busy := [user for user in users if not user.done]:
        rounds += 1
        writing = [user for user in busy if not user.reading]
        reader = min((user for user in busy if user.reading), key=lambda user: user.last_part, default=None)
        if reader is not None:
            reader.last_part = rounds
            reader.read()
        for user in writing:
            user.step()
    return [turn for user in users for turn in user.turns]


@dataclass
class _User:
    """One who asks, turn by turn, and waits for each answer."""

    session: Session
    ahead: Sequence[Sequence[int]]  # the turns, said and unsaid
    decode_tokens: int
    clock: Clock
    turns: list[Turn] = field(default_factory=list)
    last_part: int = 0
    _unread: list[int] = field(default_factory=list)
    _stamps: list[float] = field(default_factory=list)
    _token: int | None = None
    _asked_s: float = 0.0
    _prompt_s: float = 0.0
    _prompt_tokens: int = 0
    _written: int = 0
    _rng: np.random.Generator = field(default_factory=GREEDY.rng)

    @property
    def done(self) -> bool:
        return len(self.turns) == len(self.ahead)

    @property
    def reading(self) -> bool:
        return bool(self._unread)

    def ask(self) -> None:
        """Begin the next turn: its tokens, and the last of the answer before, which no step has run."""
        kept = [] if self._token is None else [self._token]
        self._unread = [*kept, *self.ahead[len(self.turns)]]
        self._prompt_tokens, self._prompt_s, self._written = len(self._unread), 0.0, 0
        self._stamps = [0.0] * (self.decode_tokens + 1)
        self._asked_s = self.clock()

    def read(self) -> None:
        """Run a part of the prompt; the first token comes of the last part."""
        part, self._unread = self._unread[:CHUNK], self._unread[CHUNK:]
        start = self.clock()
        logits = self.session.prefill(part)
        self._prompt_s += self.clock() - start
        if not self._unread:
            self._take(logits)

    def step(self) -> None:
        """The next token of the answer."""
        assert self._token is not None
        self._take(self.session.step(self._token))

    def _take(self, logits: Logits) -> None:
        self._token = pick(logits, GREEDY, self._rng)
        self._stamps[self._written] = self.clock()
        self._written += 1
        if self._written <= self.decode_tokens:
            return
        self.turns.append(Turn(self._prompt_tokens, self._asked_s, self._prompt_s, self._stamps))
        if not self.done:
            self.ask()
