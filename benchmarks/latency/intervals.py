"""What a handful of rounds can and cannot tell: intervals of medians, and who is told apart from whom.

Knows numbers; not what they measure. Seeds are fixed: the same rounds give the same intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
_SEED = 1
# With fewer rounds even the two extremes hold the true median less than 93 times of 100.
ENOUGH_ROUNDS = 5


def bootstrap_median(
    samples: Sequence[float], confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Percentile bootstrap of the median (Efron 1979); None for fewer than two samples."""
    if len(samples) < 2:
        return None
    values = np.asarray(samples, np.float64)
    drawn = np.random.default_rng(_SEED).integers(0, values.size, (resamples, values.size))
    medians = np.median(values[drawn], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(medians, (tail, 100 - tail))
    return float(low), float(high)


def widened(interval: tuple[float, float], middle: float, drift_percent: float) -> tuple[float, float]:
    """An interval of rounds that followed one another, as it is for rounds at any other time.

    That the machine's mean speed is another then is a second, independent source of error: distances from
    the middle, in logarithms, add as squares. Where something is not above 0 the interval stays.
    """
    if min(interval[0], middle) <= 0:
        return interval
    drift = math.log1p(drift_percent / 100)
    down = math.hypot(math.log(middle / interval[0]), drift)
    up = math.hypot(math.log(interval[1] / middle), drift)
    return middle * math.exp(-down), middle * math.exp(up)


def paired_ratio(
    a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Interval of a's share of b, from rounds in which both ran: Student's t of the logarithms' differences.

    Not a bootstrap: three rounds that all say the same do so by chance once in four, and a bootstrap of three
    cannot know. None where fewer than two rounds are paired, or a sample is not above 0.
    """
    pairs = list(zip(a, b, strict=False))
    if len(pairs) < 2 or min(min(pair) for pair in pairs) <= 0:
        return None
    logs = np.log([x / y for x, y in pairs])
    half = student_t(len(pairs) - 1, confidence) * float(logs.std(ddof=1)) / math.sqrt(len(pairs))
    middle = float(logs.mean())
    return math.exp(middle - half), math.exp(middle + half)


def told_apart(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether paired rounds say which of the two is greater."""
    ratio = paired_ratio(a, b)
    return ratio is not None and not ratio[0] <= 1 <= ratio[1]


def ranks(samples: Sequence[Sequence[float]]) -> list[int | None]:
    """Ranks by median, the greatest 1. A rank begins where all above are told apart from all below.

    So two that are not told apart always share one (and whatever lies between them with them). None for all
    where there is but one round: it tells nobody apart.
    """
    if len(samples) > 1 and min(map(len, samples)) < 2:
        return [None] * len(samples)
    medians = [float(np.median(s)) for s in samples]
    order = sorted(range(len(samples)), key=lambda n: -medians[n])
    found: list[int | None] = [None] * len(samples)
    rank = 1
    for place, n in enumerate(order):
        above, below = order[:place], order[place:]
        if all(told_apart(samples[i], samples[j]) for i in above for j in below):
            rank = place + 1
        found[n] = rank
    return found


def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t for a whole number of degrees of freedom, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_mass(middle, freedom) < confidence else (low, middle)
    return high


def _student_mass(t: float, freedom: int) -> float:
    """The chance of |T| <= t: the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for n in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (n + 1) / (n + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
