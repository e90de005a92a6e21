"""How sure one can be of a share of right answers, and of a difference between two. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z95 = 1.959963984540054


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
