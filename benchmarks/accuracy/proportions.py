"""How sure one can be of a share of right answers, and of a difference between two. Pure arithmetic.

Differences are between two that answered the same questions. Right or wrong: McNemar's exact test, and
Tango's score interval, which keeps its promise for few questions and does not shrink to nothing where the two
never differ, as a bootstrap does. Scores between: a sign-flip test and the bootstrap. Nobody is called better
unless test and interval agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "worse", "not told apart"]

# Quantiles of the normal distribution: two-sided 5 %, and 80 % power.
_Z95, _Z80 = 1.959963984540054, 0.8416212335729143
_LEVEL = 0.05
RESAMPLES = 10_000
_FEW = 8  # different values, up to which a bootstrap draws counts instead of questions
_SEED = 0  # of the bootstrap and of the signs: the same answers give the same interval


@dataclass(frozen=True)
class Comparison:
    """One against a reference on the same questions, in favour of the one where positive.

    `p` is two-sided; `interval_percent` holds the difference with 95 % (`method` says whose), and so does
    `bootstrap_percent`. `questions_to_settle`: how many more would tell a difference of the observed size 4
    times of 5; 0 when it is told, None where none was seen.
    """

    p: float
    difference_percent: float
    interval_percent: tuple[float, float]
    bootstrap_percent: tuple[float, float]
    questions_to_settle: int | None
    verdict: Verdict
    method: str

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            **vars(self),
            "interval_percent": list(self.interval_percent),
            "bootstrap_percent": list(self.bootstrap_percent),
        }


def compare(reference: Sequence[float], other: Sequence[float]) -> Comparison:
    """How the other did beside the reference: right (1) or wrong (0) each, or scores from 0 to 1."""
    first, second = (np.asarray(each, np.float64) for each in (reference, other))
    if set(np.unique(np.concatenate([first, second]))) <= {0.0, 1.0}:
        return _compare_right(first == 1, second == 1)
    return _compare_scores(second - first)


def _compare_right(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Comparison:
    n, lost, won = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    p = mcnemar_p(first.tolist(), second.tolist())
    interval = tango_percent(won, lost, n)
    verdict = _verdict(p, interval)
    share, difference = (won + lost) / n, (won - lost) / n
    return Comparison(
        p=p,
        difference_percent=100 * difference,
        interval_percent=interval,
        bootstrap_percent=bootstrap_percent(second.astype(float) - first),
        questions_to_settle=_more(questions_needed(share, difference), n, verdict),
        verdict=verdict,
        method="exact McNemar test, Tango score interval",
    )


def _compare_scores(differences: NDArray[np.float64]) -> Comparison:
    p, interval = sign_flip_p(differences), bootstrap_percent(differences)
    verdict = _verdict(p, interval)
    mean, variance = float(differences.mean()), float(differences.var())
    needed = None if mean == 0 else (_Z95 + _Z80) ** 2 * variance / mean**2
    return Comparison(
        p=p,
        difference_percent=100 * mean,
        interval_percent=interval,
        bootstrap_percent=interval,
        questions_to_settle=_more(needed, len(differences), verdict),
        verdict=verdict,
        method="sign-flip test, bootstrap interval",
    )


def _verdict(p: float, interval: tuple[float, float]) -> Verdict:
    if p >= _LEVEL or interval[0] <= 0 <= interval[1]:
        return "not told apart"
    return "better" if interval[0] > 0 else "worse"


def _more(needed: float | None, n: int, verdict: Verdict) -> int | None:
    if verdict != "not told apart":
        return 0
    return None if needed is None else max(1, math.ceil(needed) - n)


def wilson_percent(correct: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, percent (Wilson, 1927)."""
    if n == 0:
        return 0.0, 100.0
    share, z2 = correct / n, _Z95 * _Z95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and n right the bound is exact; rounding must not push it over the edge.
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def mcnemar_p(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p of the exact test on paired answers (McNemar, 1947): only disagreements count.

    With b questions right in the first alone and c in the second alone, b is binomial(b + c, 1/2) if the two
    are equally good.
    """
    b = sum(x and not y for x, y in zip(first, second, strict=True))
    c = sum(y and not x for x, y in zip(first, second, strict=True))
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))


def tango_percent(won: int, lost: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of the difference of paired shares (won - lost) / n, percent (Tango, 1998).

    Statistics in Medicine 17: the differences that a score test with the shares estimated under that
    difference does not reject.
    """
    observed = (won - lost) / n

    def excess(difference: float) -> float:
        return tango_score(won, lost, n, difference) ** 2 - _Z95**2

    return 100 * _root(excess, observed, -1.0), 100 * _root(excess, observed, 1.0)


def tango_score(won: int, lost: int, n: int, difference: float) -> float:
    """The score statistic of 'the true difference is this one', about normal when it is.

    Under it the share of lost questions is likeliest at the positive root of a quadratic equation.
    """
    a = 2 * n
    b = -won - lost + (2 * n - won + lost) * difference
    c = -lost * difference * (1 - difference)
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * share + difference * (1 - difference))
    gap = won - lost - n * difference
    if variance <= 0:
        return 0.0 if abs(gap) < 1e-12 * n else math.copysign(math.inf, gap)
    return gap / math.sqrt(variance)


def _root(function: Callable[[float], float], inside: float, end: float) -> float:
    """Where a function that is below 0 at `inside` first is above it on the way to `end`; else `end`."""
    if function(end) <= 0:
        return end
    low, high = inside, end
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2


def bootstrap_percent(differences: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of the mean over questions drawn anew, percent (Efron, 1979): question by question.

    Always from the same seed.
    """
    rng, n = np.random.default_rng(_SEED), len(differences)
    # Equal differences are one box of a multinomial draw: right and wrong have three, whatever n is.
    values, counts = np.unique(differences, return_counts=True)
    if len(values) <= _FEW:
        means = rng.multinomial(n, counts / n, RESAMPLES) @ values / n
    else:
        pieces = _pieces(RESAMPLES, n)
        means = np.concatenate([differences[rng.integers(0, n, (size, n))].mean(axis=1) for size in pieces])
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(low), 100 * float(high)


def sign_flip_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p of 'the two are exchangeable on every question' (Fisher, 1935): signs drawn at random.

    The observed signs count as one draw (Phipson and Smyth, 2010), so that p is never 0.
    """
    rng, n = np.random.default_rng(_SEED), len(differences)
    observed = abs(float(differences.sum())) * (1 - 1e-12)
    extreme = 0
    for size in _pieces(RESAMPLES, n):
        signs = 2.0 * rng.integers(0, 2, (size, n)) - 1
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return (1 + extreme) / (1 + RESAMPLES)


def questions_needed(discordant: float, difference: float) -> float | None:
    """Questions that tell a paired difference 4 times of 5 at the 5 % level; None where there is none.

    `discordant` is the share of questions on which the two disagree: n = (z_a sqrt(discordant) + z_b
    sqrt(discordant - difference^2))^2 / difference^2 (Connor, Biometrics 43, 1987).
    """
    if difference == 0:
        return None
    spread = math.sqrt(max(0.0, discordant - difference**2))
    return (_Z95 * math.sqrt(discordant) + _Z80 * spread) ** 2 / difference**2


def _pieces(total: int, width: int) -> list[int]:
    """Sizes of draws that make `total` rows, of at most about a million numbers each."""
    rows = max(1, 1_000_000 // max(1, width))
    return [min(rows, total - at) for at in range(0, total, rows)]
