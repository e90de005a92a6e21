"""From logits to tokens: sampling, constraints, stop tokens and the generation loop, once for every runtime.

Knows sessions and token ids. Does not know text (stop strings are in stop_strings.py), tokenizers, chat,
grammars, or which library is underneath.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from fox_edge.errors import ContextOverflowError, FoxEdgeError
from runtimes.base import Logits, Session
from runtimes.lookup import LookupSession

FinishReason = Literal["stop", "length", "context"]

# How many of the most likely tokens top-p looks at first; more only when their mass does not suffice.
_FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 is greedy, and then only the repeat penalty does something.

    The repeat penalty comes first: of tokens among the last `repeat_window` (of prompt and answer), positive
    logits are divided by it and others multiplied (Keskar et al., 2019; llama.cpp's meaning). Temperature
    then shapes the distribution, and what is left is cut: `top_k` keeps the most likely tokens (0: all),
    top_p the fewest most likely of those whose share of the mass reaches it (Holtzman et al., 2020), min_p
    tokens at least this share as likely as the most likely one (Nguyen et al., 2024).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    top_k: int = 0
    repeat_penalty: float = 1.0
    repeat_window: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise FoxEdgeError(f"temperature is {self.temperature}, but must be a number from 0")
        if not 0 < self.top_p <= 1:
            raise FoxEdgeError(f"top_p is {self.top_p}, but must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise FoxEdgeError(f"min_p is {self.min_p}, but must be from 0 to 1")
        if self.seed is not None and self.seed < 0:
            raise FoxEdgeError(f"seed is {self.seed}, but must be from 0")
        if self.top_k < 0:
            raise FoxEdgeError(f"top_k is {self.top_k}, but must be from 0 (0: all tokens)")
        if not 0 < self.repeat_penalty < math.inf:
            raise FoxEdgeError(
                f"repeat_penalty is {self.repeat_penalty}, but must be a number above 0 (1: none)"
            )
        if self.repeat_window < 0:
            raise FoxEdgeError(f"repeat_window is {self.repeat_window}, but must be from 0")

    def rng(self) -> np.random.Generator:
        """A fresh source of randomness: the same one for the same seed."""
        return np.random.default_rng(self.seed)


GREEDY = Sampling()


def pick(logits: Logits, sampling: Sampling, rng: np.random.Generator) -> int:
    """Choose a token id from logits (vocab,), without penalties; raises FoxEdgeError for no numbers."""
    best = int(logits.argmax())
    peak = float(logits[best])  # argmax finds a NaN if there is one
    if not math.isfinite(peak):
        raise FoxEdgeError(f"the model's logits are not numbers (token {best} has {peak})")
    if sampling.temperature == 0:
        return best
    weights = np.exp((logits.astype(np.float64) - peak) / sampling.temperature)
    ids = _heaviest(weights, sampling.top_k) if 0 < sampling.top_k < weights.size else None
    if sampling.top_p < 1:
        nucleus = _nucleus(weights if ids is None else weights[ids], sampling.top_p)
        ids = nucleus if ids is None else ids[nucleus]
    if ids is None:
        ids = np.arange(weights.size)
    if sampling.min_p > 0:
        ids = ids[weights[ids] >= sampling.min_p]  # the most likely token weighs exactly 1
    mass = np.cumsum(weights[ids])
    drawn = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
    return int(ids[min(drawn, ids.size - 1)])


def penalize(logits: Logits, recent: Collection[int], penalty: float) -> None:
    """Make tokens less likely, in place, that are among the recent ones; each once."""
    ids = np.unique(np.fromiter(recent, np.int64, len(recent)))
    held = logits[ids]
    logits[ids] = np.where(held > 0, held / penalty, held * penalty)


def _heaviest(weights: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` heaviest weights, heaviest first; equal ones in order of their ids.

    The result must not depend on how a partition shuffles, so equals at the edge are chosen by id as well.
    """
    least = np.partition(weights, weights.size - count)[weights.size - count]
    above = np.flatnonzero(weights > least)
    above = above[np.argsort(-weights[above], kind="stable")]
    return np.concatenate([above, np.flatnonzero(weights == least)[: count - above.size]])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Ids of the fewest heaviest weights that hold `top_p` of the sum, heaviest first.

    A partition finds the first few candidates; sorting a vocabulary of 256,000 for them would be waste.
    """
    needed = top_p * weights.sum()
    count = _FIRST_CANDIDATES
    while True:
        count = min(count, weights.size)
        ids = _heaviest(weights, count)
        mass = np.cumsum(weights[ids])
        if mass[-1] >= needed or count == weights.size:
            return ids[: int(np.searchsorted(mass, needed)) + 1]
        count *= 16


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
    ids = _heaviest(exact, min(top, exact.size)) if top else ()
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

    def pick(self, logits: Logits) -> int:
        """The token after which these are the logits (vocab,), which are left as they are."""
        shaped = logits
        penalty = self.sampling.repeat_penalty
        if self.constraint is not None or (penalty != 1 and self._recent):
            shaped = logits.copy()
        if penalty != 1 and self._recent:
            penalize(shaped, self._recent, penalty)
        if self.constraint is not None:
            self.constraint.apply(shaped)
        token = pick(shaped, self.sampling, self._rng)
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._top is not None:
            self.logprobs.append(logprobs_of(logits, token, self._top))
        self._recent.append(token)
        return token


class Generation(Iterator[int]):
    """The tokens a model goes on with, one per `next`; `finish_reason` says why it ended.

    "stop": a stop token came (it is not among the tokens); "length": max_tokens were made; "context": the
    context is full. None while tokens may still come. The newest token is in the session's cache only
    once the one after it was asked for. `logprobs` are those of `tokens`, where they were asked for.
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

    def __next__(self) -> int:
        """The next token id; the first call runs what is left of the prompt."""
        if self.finish_reason is None and len(self.tokens) == self._max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is None and self.tokens and self._session.length >= self._session.context:
            self.finish_reason = "context"
        if self.finish_reason is not None:
            raise StopIteration
        session = self._session
        logits = session.step(self.tokens[-1]) if self.tokens else session.prefill(self._prompt[self._fed :])
        token = self._picker.pick(logits)
        if token in self._stop_ids:
            self.finish_reason = "stop"
            raise StopIteration
        self.tokens.append(token)
        return token


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
