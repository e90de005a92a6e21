"""From logits to tokens: constraints, stop tokens and the generation loop, once for every runtime.

Knows sessions and token ids. How a token is chosen from a row of logits is in sampling.py. Does not know text
(stop strings are in stop_strings.py), tokenizers, chat, grammars, or which library is underneath.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from fox_edge.errors import ContextOverflowError, FoxEdgeError
from runtimes.base import BatchingSession, Logits, Session
from runtimes.lookup import LookupSession
from runtimes.sampling import GREEDY, Choice, Sampling, choose, heaviest, penalize, pick

FinishReason = Literal["stop", "length", "context"]


class Constraint(Protocol):
    """What may come next: a grammar, a schema, a list of forbidden tokens. One object per generation."""

    def apply(self, logits: Logits) -> None:
        """Change logits (vocab,) in place before a token is picked: -inf for what may not come."""
        ...

    def accept(self, token: int) -> None:
        """Told every token that was picked, a stop token too."""
        ...


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities, of the model's own logits: before penalty, mask and temperature.

    `top` are the likeliest ids, likeliest first, with theirs; the picked token need not be among them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(logits: Logits, token: int, top: int) -> Logprobs:
    """Log-probabilities of the token and of the `top` likeliest under logits (vocab,)."""
    exact = logits.astype(np.float64)
    peak = exact.max()
    total = peak + math.log(np.exp(exact - peak).sum())
    ids = heaviest(exact, min(top, exact.size)) if top else ()
    return Logprobs(token, float(exact[token] - total), tuple((int(i), float(exact[i] - total)) for i in ids))


class Picker:
    """Turns rows of logits into tokens, in order; what Generation does at every step, and nothing more.

    `recent` are tokens that came before, for the repeat penalty. `logprobs`: None, or how many of the
    likeliest tokens are kept beside each picked one in `self.logprobs`.
    """

    def __init__(
        self,
        sampling: Sampling,
        rng: np.random.Generator | None = None,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
        recent: Sequence[int] = (),
    ) -> None:
        self.sampling, self.constraint = sampling, constraint
        self.logprobs: list[Logprobs] = []
        self._rng, self._top = rng or sampling.rng(), logprobs
        self._recent: deque[int] = deque(recent, maxlen=sampling.repeat_window)
        self._choice: Choice | None = None

    def choice(self) -> Choice | None:
        """How the next token is to be chosen by whoever has its logits; None where they are needed here.

        The same one until a token is accepted.
        """
        if self.constraint is not None or self._top is not None:
            return None
        if self._choice is None:
            self._choice = self._next_choice()
        return self._choice

    def pick(self, logits: Logits) -> int:
        """The token after which these are the logits (vocab,), which are left as they are."""
        choice = self._choice or self._next_choice()
        if self.constraint is None:
            token = choose(logits, choice)
        else:
            shaped = logits.copy()
            penalize(shaped, choice.recent, choice.sampling.repeat_penalty)
            self.constraint.apply(shaped)
            token = pick(shaped, choice.sampling, choice.draw)
        if self._top is not None:
            self.logprobs.append(logprobs_of(logits, token, self._top))
        return self.accept(token)

    def accept(self, token: int) -> int:
        """Go on from a token that was chosen as `choice` says."""
        if token < 0:
            raise FoxEdgeError("the model's logits are not numbers")
        if self.constraint is not None:
            self.constraint.accept(token)
        self._recent.append(token)
        self._choice = None
        return token

    def _next_choice(self) -> Choice:
        sampling = self.sampling
        recent = tuple(self._recent) if sampling.repeat_penalty != 1 else ()
        return Choice(sampling, self._rng.random() if sampling.temperature else 0.0, recent)


class Generation(Iterator[int]):
    """The tokens a model goes on with, one per `next`; `finish_reason` says why it ended.

    "stop": a stop token came (it is not among the tokens); "length": max_tokens were made; "context": the
    context is full. None while tokens may still come. The newest token is in the session's cache only
    once the one after it was asked for. `logprobs` are those of `tokens`, where they were asked for.
    `batching` is the session, where it can take steps together with others.
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        sampling: Sampling,
        stop_ids: Collection[int],
        max_tokens: int | None,
        rng: np.random.Generator | None = None,
        *,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
        history: Sequence[int] = (),
    ) -> None:
        if not len(prompt):
            raise FoxEdgeError("a model needs at least one token to go on from")
        if max_tokens is not None and max_tokens < 0:
            raise FoxEdgeError(f"max_tokens is {max_tokens}, but must be from 0")
        needed = session.length + len(prompt)
        if needed > session.context:
            raise ContextOverflowError(
                f"a prompt of {needed} tokens does not fit a context of {session.context}"
            )
        self.finish_reason: FinishReason | None = None
        self.tokens: list[int] = []
        self._session, self._prompt, self._fed = session, prompt, 0
        self.batching = session if isinstance(session, BatchingSession) else None
        window = sampling.repeat_window
        recent = [*history[max(0, len(history) - window) :], *prompt[max(0, len(prompt) - window) :]]
        self._picker = Picker(sampling, rng, constraint, logprobs, recent)
        self._stop_ids, self._max_tokens = frozenset(stop_ids), max_tokens

    @property
    def logprobs(self) -> list[Logprobs]:
        """One entry per token, when they were asked for; else none."""
        return self._picker.logprobs[: len(self.tokens)]

    def feed(self, most: int) -> bool:
        """Run `most` tokens of a prompt that has more left, and say True; else leave the rest to `next`.

        For whoever has other work between the parts of a long prompt; `next` alone does without.
        """
        if self.tokens or len(self._prompt) - self._fed <= most:
            return False
        self._session.prefill(self._prompt[self._fed : self._fed + most])
        self._fed += most
        return True

    def pending(self) -> int | None:
        """The token that is to be run next; None while the prompt is not run, and when the answer is over.

        Looks whether it is over: `finish_reason` then says why. With `choice` and `take` this is `next` in
        parts, for `run_together`.
        """
        if self.finish_reason is None and len(self.tokens) == self._max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is None and self.tokens and self._session.length >= self._session.context:
            self.finish_reason = "context"
        return self.tokens[-1] if self.tokens and self.finish_reason is None else None

    def choice(self) -> Choice | None:
        """How the token after it is to be chosen; None where its logits must come here."""
        return self._picker.choice()

    def take(self, result: Logits | int) -> int | None:
        """The next token, from its logits or as chosen by `choice`; None when it was a stop token."""
        picked = self._picker.pick(result) if isinstance(result, np.ndarray) else self._picker.accept(result)
        if picked in self._stop_ids:
            self.finish_reason = "stop"
            return None
        self.tokens.append(picked)
        return picked

    def __next__(self) -> int:
        """The next token id; the first call runs what is left of the prompt."""
        token = self.pending()
        if self.finish_reason is not None:
            raise StopIteration
        picked = self.take(self._first() if token is None else self._run(token))
        if picked is None:
            raise StopIteration
        return picked

    def _first(self) -> Logits | int:
        """Run what is left of the prompt."""
        rest, choice = self._prompt[self._fed :], self.choice()
        if self.batching is not None and choice is not None:
            return self.batching.prefill_choose(rest, choice)
        return self._session.prefill(rest)

    def _run(self, token: int) -> Logits | int:
        """Run one token, alone; where a session chooses by itself, no row of logits is moved for it."""
        if self.batching is None:
            return self._session.step(token)
        return self.batching.step_many((self.batching,), (token,), (self.choice(),))[0]


def run_together(generations: Sequence[Generation]) -> dict[Generation, Logits | int]:
    """Run the newest token of each of several generations, in one pass over the weights that they share.

    What `take` of each is to be given. One that is over is not among them, and none is where fewer than two
    go on or their sessions cannot step together: `next` is for those. Raises what `step_many` raises.
    """
    steps = {g: token for g in generations if (token := g.pending()) is not None}
    sessions = [g.batching for g in steps if g.batching is not None]
    if len(steps) < 2 or len(sessions) < len(steps):
        return {}
    results = sessions[0].step_many(sessions, list(steps.values()), [g.choice() for g in steps])
    return dict(zip(steps, results, strict=True))


def generate(
    session: Session,
    tokens: Sequence[int],
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    max_tokens: int | None = None,
    rng: np.random.Generator | None = None,
    *,
    constraint: Constraint | None = None,
    logprobs: int | None = None,
    history: Sequence[int] = (),
) -> Generation:
    """Append `tokens` to the session and go on: an iterator of ids that knows its `finish_reason`.

    `max_tokens` None goes on until a stop token or the end of the context. Without `rng` the draw follows
    `sampling.seed`. `history` is what the session's cache holds before `tokens`, for the repeat penalty
    alone. Raises ContextOverflowError at once, the cache untouched, when the prompt does not fit.
    """
    if isinstance(session, LookupSession):
        session.expect(sampling.temperature == 0 and sampling.repeat_penalty == 1 and constraint is None)
    return Generation(
        session,
        tokens,
        sampling,
        stop_ids,
        max_tokens,
        rng,
        constraint=constraint,
        logprobs=logprobs,
        history=history,
    )
