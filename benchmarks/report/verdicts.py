"""One artifact before and after, figure by figure: a regression, an improvement, or not told apart.

A change is one only when its 95 % interval leaves no change out, and when it is larger than a tolerance. The
intervals of speeds and times are wider where the machine was unsteady. Knows rows and intervals; not files,
nor what two results must have in common for a figure to be judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy.proportions import compare as paired
from benchmarks.report.figures import interval_of

Row = Mapping[str, Any]

WORSE, BETTER, SAME, UNJUDGED = "regression", "improvement", "not told apart", "not comparable"


@dataclass(frozen=True)
class _Figure:
    """One figure: whether more of it is better, what it depends on, and whether it is the same every time."""

    key: str
    more_is_better: bool
    of: str  # 'machine', 'text' or 'artifact': what must be equal for a comparison to mean something
    exact: bool = False


_FIGURES = (
    _Figure("bytes", False, "artifact", exact=True),
    _Figure("load_s", False, "machine"),
    _Figure("time_to_first_token_s", False, "machine"),
    _Figure("prompt_tokens_per_s", True, "machine"),
    _Figure("decode_tokens_per_s", True, "machine"),
    _Figure("total_tokens_per_s", True, "machine"),
    _Figure("token_p95_s", False, "machine"),
    _Figure("token_p99_s", False, "machine"),
    _Figure("peak_rss_bytes", False, "machine"),
    _Figure("anonymous_rss_bytes", False, "machine"),
    _Figure("peak_device_bytes", False, "machine"),
    _Figure("energy_joules_per_token", False, "machine"),
    _Figure("device_energy_joules_per_token", False, "machine"),
    _Figure("mean_kl_nats", False, "text"),
    _Figure("top1_agreement_percent", True, "text"),
)


def judge_row(
    old: Row, new: Row, comparable: Mapping[str, bool], tolerance: float
) -> Iterator[dict[str, Any]]:
    """Every figure that both rows have.

    `comparable`: which kinds of figures may be judged; `tolerance`: the share of a figure that a change must
    exceed.
    """
    broken = [bool(r.get("error")) for r in (old, new)]
    if any(broken):
        verdict = SAME if all(broken) else WORSE if broken[1] else BETTER
        yield _result("runs", None if broken[0] else 1, None if broken[1] else 1, None, verdict) | {
            "error": new.get("error") or old.get("error")
        }
        return
    if any(old.get(k) != new.get(k) for k in ("positions", "fidelity_from")):
        comparable = {**comparable, "text": False}
    for figure in _FIGURES:
        if old.get(figure.key) is not None and new.get(figure.key) is not None:
            yield _judged(figure, old, new, comparable[figure.of], tolerance)
    for asked in old.get("tasks") or ():
        other = next((t for t in new.get("tasks") or () if t.get("task") == asked.get("task")), None)
        if other and asked.get("n") and other.get("n"):
            yield _accuracy(asked, other)


def _judged(figure: _Figure, old: Row, new: Row, comparable: bool, tolerance: float) -> dict[str, Any]:
    """The ratio of one figure and what its interval says."""
    a, b = float(old[figure.key]), float(new[figure.key])
    between = (
        None if figure.exact else ratio_interval(a, _bounds(old, figure.key), b, _bounds(new, figure.key))
    )
    result = _result(figure.key, old[figure.key], new[figure.key], between, SAME)
    if not comparable:
        return result | {"verdict": UNJUDGED}
    apart = (a != b) if figure.exact else between is not None and not between[0] <= 1 <= between[1]
    if apart and abs(b - a) > tolerance * abs(a):
        result["verdict"] = BETTER if (b > a) == figure.more_is_better else WORSE
    return result


def _bounds(row: Row, key: str) -> tuple[float, float] | None:
    """The interval of a figure; one run's extremes are none."""
    found = interval_of(row, key)
    return None if found is None or (found[0] == found[1] and row.get("runs") == 1) else found


def ratio_interval(
    a: float, around_a: tuple[float, float] | None, b: float, around_b: tuple[float, float] | None
) -> tuple[float, float] | None:
    """95 % interval of b / a from the intervals of both; None where one is unknown or not above zero.

    The variances of the logarithms are recovered from the limits (MOVER; Zou and Donner, Statistics in
    Medicine 27, 2008): the distance to each limit of the ratio is the root of the sum of squares of the
    distances that push it there.
    """
    if around_a is None or around_b is None or min(a, b, around_a[0], around_b[0]) <= 0:
        return None
    la, lb = math.log(a), math.log(b)
    down_a, up_a = la - math.log(around_a[0]), math.log(around_a[1]) - la
    down_b, up_b = lb - math.log(around_b[0]), math.log(around_b[1]) - lb
    low, high = math.hypot(down_b, up_a), math.hypot(up_b, down_a)
    return math.exp(lb - la - low), math.exp(lb - la + high)


def _accuracy(old: Row, new: Row) -> dict[str, Any]:
    """Right answers: paired when both carry answers to the same questions, else by their two intervals."""
    key = f"{old['task']}: accuracy_percent"
    result = _result(key, old.get("accuracy_percent"), new.get("accuracy_percent"), None, SAME)
    ours, theirs = (t.get("answers") or () for t in (new, old))
    if ours and _asked(ours) == _asked(theirs):
        told = paired([_score(a) for a in theirs], [_score(a) for a in ours])
        verdicts = {"worse": WORSE, "better": BETTER}
        return result | {
            "paired_p": told.p,
            "difference_percent": told.difference_percent,
            "difference_interval_percent": list(told.interval_percent),
            "verdict": verdicts.get(told.verdict, SAME),
        }
    if old.get("n") != new.get("n"):
        result["n"] = [old.get("n"), new.get("n")]
    limits = _difference_interval(old, new)
    if limits and not limits[0] <= 0 <= limits[1]:
        result["verdict"] = BETTER if limits[0] > 0 else WORSE
    return result | {"paired_p": None, "difference_interval_percent": limits}


def _asked(answers: Sequence[Row]) -> list[tuple[Any, Any]]:
    """Which questions were asked, as far as answers tell."""
    return [(a.get("question"), a.get("expected")) for a in answers]


def _score(answer: Row) -> float:
    score = answer.get("score")
    return float(bool(answer.get("right")) if score is None else score)


def _difference_interval(old: Row, new: Row) -> tuple[float, float] | None:
    """95 % interval of the difference of two shares from their own (Newcombe, 1998, method 10)."""
    p, q, around_p, around_q = (t.get(k) for k in ("accuracy_percent", "ci95_percent") for t in (old, new))
    if p is None or q is None or not around_p or not around_q:
        return None
    low = math.hypot(q - around_q[0], around_p[1] - p)
    high = math.hypot(around_q[1] - q, p - around_p[0])
    return q - p - low, q - p + high


def _result(
    figure: str, before: Any, after: Any, between: tuple[float, float] | None, verdict: str
) -> dict[str, Any]:
    ratio = after / before if before and after is not None else None
    return {
        "figure": figure,
        "before": before,
        "after": after,
        "ratio": ratio,
        "interval": None if between is None else list(between),
        "change_percent": None if ratio is None else 100 * (ratio - 1),
        "verdict": verdict,
    }
