"""Several users at once on the same weights: who is served when, and what the clock says of each.

All ask at the same time, and again as soon as they were answered. Tokens come as `fox-edge serve` deals them
out: every round, each answer that has begun gets one token, all in one pass where the sessions can step
together, and one prompt that was not read yet gets a part run, another one's in the next round. A token is
there when the pass that it comes of is done. Knows sessions, tokens and a clock; not figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fox_edge.errors import FoxEdgeError
from runtimes.base import BatchingSession, RemoteSession, Session, SharingSession
from runtimes.sampling import GREEDY, Choice, pick

Clock = Callable[[], float]
# Tokens of a prompt that run at once, while others wait for their next token: as the server does it.
CHUNK = 64
_LIKELIEST = Choice(GREEDY)


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


def steps_together(sessions: Sequence[Session]) -> bool:
    """Whether these sessions take their steps in common."""
    return len(sessions) > 1 and all(isinstance(session, BatchingSession) for session in sessions)


def users_in_a_pass(sessions: Sequence[Session]) -> int:
    """How many users' tokens come of one reading of the weights; 1 where each token has its own."""
    count = len(sessions)
    if not steps_together(sessions):
        return 1
    # llama.cpp takes no more into a pass than leaves all bits alike.
    passes = -(-count // getattr(sessions[0], "most_together", count))
    return -(-count // passes)


def time_conversation(
    session: Session,
    turns: Sequence[Sequence[int]],
    decode_tokens: int,
    clock: Clock = time.perf_counter,
) -> list[Turn]:
    """One user, from an empty cache: each turn runs its own tokens, and the last of the answer before it."""
    if isinstance(session, RemoteSession):
        return [Turn(*turn) for turn in session.converse(turns, decode_tokens)]
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
    stamps, step = [0.0] * (decode_tokens + 1), _step_of(session)
    asked = clock()
    token, read = _read(session, prompt, clock)
    stamps[0] = clock()
    for n in range(1, decode_tokens + 1):
        token = step(token)
        stamps[n] = clock()
    return Turn(len(prompt), asked, read - asked, stamps), token


def _read(session: Session, prompt: Sequence[int], clock: Clock) -> tuple[int, float]:
    """Run a prompt; the likeliest token after it, chosen where the logits are if it can be, and the time."""
    if isinstance(session, BatchingSession):
        return session.prefill_choose(prompt, _LIKELIEST), clock()
    logits, read = session.prefill(prompt), clock()
    return pick(logits, GREEDY, 0.0), read


def _step_of(session: Session) -> Callable[[int], int]:
    """What runs a token and gives the likeliest one after it."""
    if isinstance(session, BatchingSession):
        return lambda token: _run_together([session], [token])[0]
    return lambda token: pick(session.step(token), GREEDY, 0.0)


def _run_together(sessions: Sequence[BatchingSession], tokens: Sequence[int]) -> list[int]:
    """One pass; the likeliest token after each."""
    found = sessions[0].step_many(sessions, tokens, [_LIKELIEST] * len(tokens))
    return [token for token in found if isinstance(token, int)]


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
    rounds, together = 0, steps_together(sessions)
    while busy := [user for user in users if not user.done]:
        rounds += 1
        writing = [user for user in busy if not user.reading]
        reader = min((user for user in busy if user.reading), key=lambda user: user.last_part, default=None)
        if reader is not None:
            reader.last_part = rounds
            reader.read()
        _write(writing, together, clock)
    return [turn for user in users for turn in user.turns]


def _write(users: Sequence[_User], together: bool, clock: Clock) -> None:
    """The next token of every answer."""
    if not (together and users):
        for user in users:
            user.take(user.step(user.token), clock())
        return
    sessions = [user.session for user in users if isinstance(user.session, BatchingSession)]
    found = _run_together(sessions, [user.token for user in users])
    now = clock()
    for user, token in zip(users, found, strict=True):
        user.take(token, now)


@dataclass
class _User:
    """One who asks, turn by turn, and waits for each answer."""

    session: Session
    ahead: Sequence[Sequence[int]]  # the turns, said and unsaid
    decode_tokens: int
    clock: Clock
    turns: list[Turn] = field(default_factory=list)
    last_part: int = 0
    token: int = -1  # the newest one, not run yet
    _unread: list[int] = field(default_factory=list)
    _stamps: list[float] = field(default_factory=list)
    _asked_s: float = 0.0
    _prompt_s: float = 0.0
    _prompt_tokens: int = 0
    _written: int = 0

    def __post_init__(self) -> None:
        own = self.session
        self.part = own.prefill_chunk if isinstance(own, BatchingSession) else CHUNK
        self.step = _step_of(own)

    @property
    def done(self) -> bool:
        return len(self.turns) == len(self.ahead)

    @property
    def reading(self) -> bool:
        return bool(self._unread)

    def ask(self) -> None:
        """Begin the next turn: its tokens, and the last of the answer before, which no step has run."""
        kept = [self.token] if self.turns else []
        self._unread = [*kept, *self.ahead[len(self.turns)]]
        self._prompt_tokens, self._prompt_s, self._written = len(self._unread), 0.0, 0
        self._stamps = [0.0] * (self.decode_tokens + 1)
        self._asked_s = self.clock()

    def read(self) -> None:
        """Run a part of the prompt; the first token comes of the last part."""
        part, self._unread = self._unread[: self.part], self._unread[self.part :]
        start = self.clock()
        if self._unread:
            self.session.prefill(part)
            self._prompt_s += self.clock() - start
        else:
            token, read = _read(self.session, part, self.clock)
            self._prompt_s += read - start
            self.take(token, self.clock())

    def take(self, token: int, now: float) -> None:
        """One more token of the answer; after the last one the next turn is asked for."""
        self.token, self._stamps[self._written] = token, now
        self._written += 1
        if self._written <= self.decode_tokens:
            return
        self.turns.append(Turn(self._prompt_tokens, self._asked_s, self._prompt_s, self._stamps))
        if not self.done:
            self.ask()
