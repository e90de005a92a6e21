"""How a token is chosen from logits: temperature, cuts and penalties, as pure functions of one draw.

Knows a row of logits and a uniform number. Does not know sessions, constraints, text, or where the number
came from: a runtime that chooses on its own device does what `choose` does, with the same draw.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from fox_edge.errors import FoxEdgeError
from runtimes.base import Logits

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


@dataclass(frozen=True)
class Choice:
    """How one token is to be chosen, whole: all that is needed to choose it where the logits are.

    `draw` is a uniform number in [0, 1) from the generation's own source of randomness (0 where none is
    needed), so that a seed gives the same text wherever tokens are chosen. `recent` are the tokens that the
    repeat penalty is for; none where there is no penalty.
    """

    sampling: Sampling = GREEDY
    draw: float = 0.0
    recent: tuple[int, ...] = ()


def choose(logits: Logits, choice: Choice) -> int:
    """The token that a choice makes of logits (vocab,), which are left as they are."""
    if choice.recent and choice.sampling.repeat_penalty != 1:
        logits = logits.copy()
        penalize(logits, choice.recent, choice.sampling.repeat_penalty)
    return pick(logits, choice.sampling, choice.draw)


def pick(logits: Logits, sampling: Sampling, draw: float) -> int:
    """Choose a token id from logits (vocab,), without penalties; raises FoxEdgeError for no numbers.

    `draw` in [0, 1) is a share of what the filters leave, summed from the heaviest token on (by id where no
    filter sorted them); greedily, nothing.
    """
    best = int(logits.argmax())
    peak = float(logits[best])  # argmax finds a NaN if there is one
    if not math.isfinite(peak):
        raise FoxEdgeError(f"the model's logits are not numbers (token {best} has {peak})")
    if sampling.temperature == 0:
        return best
    weights = np.exp((logits.astype(np.float64) - peak) / sampling.temperature)
    ids = heaviest(weights, sampling.top_k) if 0 < sampling.top_k < weights.size else None
    if sampling.top_p < 1:
        nucleus = _nucleus(weights if ids is None else weights[ids], sampling.top_p)
        ids = nucleus if ids is None else ids[nucleus]
    if ids is None:
        ids = np.arange(weights.size)
    if sampling.min_p > 0:
        ids = ids[weights[ids] >= sampling.min_p]  # the most likely token weighs exactly 1
    mass = np.cumsum(weights[ids])
    drawn = int(np.searchsorted(mass, draw * mass[-1], side="right"))
    return int(ids[min(drawn, ids.size - 1)])


def penalize(logits: Logits, recent: Collection[int], penalty: float) -> None:
    """Make tokens less likely, in place, that are among the recent ones; each once."""
    ids = np.unique(np.fromiter(recent, np.int64, len(recent)))
    held = logits[ids]
    logits[ids] = np.where(held > 0, held / penalty, held * penalty)


def heaviest(weights: np.ndarray, count: int) -> np.ndarray:
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
        ids = heaviest(weights, count)
        mass = np.cumsum(weights[ids])
        if mass[-1] >= needed or count == weights.size:
            return ids[: int(np.searchsorted(mass, needed)) + 1]
        count *= 16
