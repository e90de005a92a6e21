"""Log-likelihoods of continuations, and greedy texts, with what prompts share run once.

Knows sessions and tokens; not who asks (lm_eval_model.py) nor what is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtimes.base import Logits, Session

# (sum of natural logarithms, whether every token was the likeliest one)
Scored = tuple[float, bool]


def order(requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
    """Places of (context, continuation) such that neighbours share the longest beginnings.

    Sorted as words in a dictionary: going through them in this order runs every shared beginning once.
    """
    return sorted(range(len(requests)), key=lambda n: (list(requests[n][0]), list(requests[n][1])))


class Likelihood:
    """The only user of a session; keeps in its cache the tokens that come again.

    `computed` counts the tokens that were run.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.computed = 0
        self._held: list[int] = []  # the tokens in the cache
        self._row: Logits | None = None  # logits after exactly those
        session.reset()

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> Scored:
        """How likely the continuation (one token or more) is after the context (one token or more).

        Runs what the cache does not hold of the context, and all but the last token of the continuation.
        Raises ContextOverflowError when that does not fit.
        """
        row = self._after(list(context))
        total, greedy = log_likelihood(row[None], continuation[:1])
        if len(continuation) > 1:
            place = 1
            for rows in self.session.score(continuation[:-1]):
                part, likeliest = log_likelihood(rows, continuation[place : place + len(rows)])
                total, greedy, place = total + part, greedy and likeliest, place + len(rows)
            self.computed += len(continuation) - 1
            self.session.truncate(len(context))
        return total, greedy

    def _after(self, context: list[int]) -> Logits:
        """Logits (vocab,) after the context, which the cache then holds."""
        if self._row is not None and context == self._held:
            return self._row
        # Logits come from running: at least the last token must be run again.
        shared = min(shared_length(self._held, context), len(context) - 1)
        self._row, self._held = None, self._held[:shared]
        self.session.truncate(shared)
        # A session may hand out a view of a buffer that the next run overwrites.
        self._row = self.session.prefill(context[shared:]).copy()
        self._held = context
        self.computed += len(context) - shared
        return self._row


def log_likelihood(rows: Logits, tokens: Sequence[int]) -> Scored:
    """Of tokens (n), each under its own row of logits (n, vocab)."""
    ids = np.asarray(tokens)
    peaks = rows.max(axis=1)
    totals = np.exp(rows - peaks[:, None]).sum(axis=1, dtype=np.float64)
    picked: NDArray[np.float64] = rows[np.arange(len(ids)), ids].astype(np.float64)
    return float((picked - peaks - np.log(totals)).sum()), bool((rows.argmax(axis=1) == ids).all())


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens the two share."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
