"""From logits to tokens: sampling, stop tokens and the generation loop, once for every runtime.

Knows sessions and token ids. Does not know text, tokenizers, chat, or which library is underneath.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fox_edge.errors import ContextOverflowError, FoxEdgeError
from runtimes.base import Logits, Session

FinishReason = Literal["stop", "length", "context"]

# How many of the most likely tokens top-p looks at first; more only when their mass does not suffice.
_FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 is greedy, and then the other fields do nothing.

    Temperature shapes the distribution first; `top_p` and `min_p` both cut the result, and a token must
    pass both. top_p: the fewest most likely tokens whose mass reaches it (Holtzman et al., 2020). min_p:
    tokens at least this share as likely as the most likely one (Nguyen et al., 2024).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise FoxEdgeError(f"temperature is {self.temperature}, but must be a number from 0")
        if not 0 < self.top_p <= 1:
            raise FoxEdgeError(f"top_p is {self.top_p}, but must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise FoxEdgeError(f"min_p is {self.min_p}, but must be from 0 to 1")
        if self.seed is not None and self.seed < 0:
            raise FoxEdgeError(f"seed is {self.seed}, but must be from 0")

    def rng(self) -> np.random.Generator:
        """A fresh source of randomness: the same one for the same seed."""
        return np.random.default_rng(self.seed)


GREEDY = Sampling()


def pick(logits: Logits, sampling: Sampling, rng: np.random.Generator) -> int:
    """Choose a token id from logits (vocab,); raises FoxEdgeError when they are not numbers."""
    best = int(logits.argmax())
    peak = float(logits[best])  # argmax finds a NaN if there is one
    if not math.isfinite(peak):
        raise FoxEdgeError(f"the model's logits are not numbers (token {best} has {peak})")
    if sampling.temperature == 0:
        return best
    weights = np.exp((logits.astype(np.float64) - peak) / sampling.temperature)
    ids = _nucleus(weights, sampling.top_p) if sampling.top_p < 1 else np.arange(weights.size)
    if sampling.min_p > 0:
        ids = ids[weights[ids] >= sampling.min_p]  # the most likely token weighs exactly 1
    mass = np.cumsum(weights[ids])
    drawn = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
    return int(ids[min(drawn, ids.size - 1)])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Ids of the fewest heaviest weights that hold `top_p` of the sum, heaviest first.

    A partition finds the first few candidates; sorting a vocabulary of 256,000 for them would be waste.
    """
    needed = top_p * weights.sum()
    count = _FIRST_CANDIDATES
    while True:
        count = min(count, weights.size)
        ids = np.argpartition(weights, weights.size - count)[weights.size - count :]
        # Equal weights in order of their ids: the result must not depend on how a partition shuffles.
        ids = ids[np.lexsort((ids, -weights[ids]))]
        mass = np.cumsum(weights[ids])
        if mass[-1] >= needed or count == weights.size:
            return ids[: int(np.searchsorted(mass, needed)) + 1]
        count *= 16


class Generation(Iterator[int]):
    """The tokens a model goes on with, one per `next`; `finish_reason` says why it ended.

    "stop": a stop token came (it is not among the tokens); "length": max_tokens were made; "context": the
    context is full. None while tokens may still come. The newest token is in the session's cache only
    once the one after it was asked for.
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        sampling: Sampling,
        stop_ids: Collection[int],
        max_tokens: int | None,
        rng: np.random.Generator | None = None,
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
        self._session, self._prompt = session, prompt
        self._sampling, self._rng = sampling, rng or sampling.rng()
        self._stop_ids, self._max_tokens = frozenset(stop_ids), max_tokens

    def __next__(self) -> int:
        """The next token id; the first call runs the prompt."""
        if self.finish_reason is None and len(self.tokens) == self._max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is None and self.tokens and self._session.length >= self._session.context:
            self.finish_reason = "context"
        if self.finish_reason is not None:
            raise StopIteration
        session = self._session
        logits = session.step(self.tokens[-1]) if self.tokens else session.prefill(self._prompt)
        token = pick(logits, self._sampling, self._rng)
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
) -> Generation:
    """Append `tokens` to the session and go on: an iterator of ids that knows its `finish_reason`.

    `max_tokens` None goes on until a stop token or the end of the context. Without `rng` the draw follows
    `sampling.seed`. Raises ContextOverflowError at once, the cache untouched, when the prompt does not fit.
    """
    return Generation(session, tokens, sampling, stop_ids, max_tokens, rng)
