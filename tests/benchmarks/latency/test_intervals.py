"""Intervals against closed forms and simulated worlds whose truth is known; ranks by hand."""

import math

import numpy as np
import pytest

from benchmarks.latency.intervals import (
    bootstrap_median,
    paired_ratio,
    ranks,
    student_t,
    told_apart,
    widened,
)


def exact_bounds(n: int) -> tuple[int, int]:
    """Ranks (from 1) of the 2.5 % and 97.5 % points of the bootstrapped median of n distinct values, n odd.

    The median of a resample is at most the k-th value when more than half of its n draws are among the first
    k: a binomial tail, no simulation.
    """

    def at_most(k: int) -> float:
        p = k / n
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n // 2 + 1, n + 1))

    below = [k for k in range(1, n + 1) if at_most(k) > 0.025]
    above = [k for k in range(1, n + 1) if at_most(k) >= 0.975]
    return below[0], above[0]


@pytest.mark.parametrize("n", [3, 5, 7, 9, 21, 51])
def test_the_bootstrap_of_a_median_is_the_one_that_the_binomial_gives(n):
    values = np.random.default_rng(n).normal(size=n)
    low, high = exact_bounds(n)
    ordered = np.sort(values)
    assert bootstrap_median(values) == pytest.approx((ordered[low - 1], ordered[high - 1]))


def test_intervals_are_the_same_every_time_and_need_two_samples():
    assert bootstrap_median([1.0]) is None
    assert bootstrap_median([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap_median([3, 1, 2, 5, 4]) == bootstrap_median([3, 1, 2, 5, 4])


def test_the_true_median_is_held_about_as_often_as_promised():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        low, high = bootstrap_median(rng.exponential(size=15), resamples=400)
        held += low <= math.log(2) <= high
    assert 0.90 < held / 300 < 0.99


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (30, 2.0423)],
)
def test_student_s_quantiles_are_the_tables(freedom, quantile):
    assert student_t(freedom) == pytest.approx(quantile, abs=1e-4)


def test_an_interval_is_widened_by_hand():
    # 100 in [90, 125] and half or double at any other time: in logarithms, roots of sums of squares.
    down, up = math.hypot(math.log(100 / 90), math.log(2)), math.hypot(math.log(1.25), math.log(2))
    found = widened((90, 125), 100, drift_percent=100)
    assert found == pytest.approx((100 * math.exp(-down), 100 * math.exp(up)))
    assert widened((90, 125), 100, 0) == pytest.approx((90, 125))
    assert widened((0, 1), 0.5, 100) == (0, 1)


def test_runs_on_a_machine_that_wanders_agree_once_their_intervals_know_of_it():
    # The machine keeps its speed for a whole run, five rounds, and has another one in the next.
    rng = np.random.default_rng(5)
    runs = []
    for _ in range(60):
        speed = 100 * math.exp(rng.normal(0, 0.2))
        rounds = speed * np.exp(rng.normal(0, 0.02, 5))
        runs.append((bootstrap_median(rounds, resamples=400), float(np.median(rounds))))

    def agreeing(intervals):
        pairs = [(a, b) for n, a in enumerate(intervals) for b in intervals[:n]]
        return sum(max(a[0], b[0]) <= min(a[1], b[1]) for a, b in pairs) / len(pairs)

    assert agreeing([found for found, _ in runs]) < 0.3
    drift = 100 * math.expm1(1.96 * 0.2)
    assert agreeing([widened(found, middle, drift) for found, middle in runs]) > 0.95


def test_a_paired_ratio_by_hand():
    # Logarithms of the ratios: 0, ln 2, ln 4: mean ln 2, deviation ln 2, so 4.3027 * ln 2 / sqrt(3) each way.
    low, high = paired_ratio([1, 2, 4], [1, 1, 1])
    half = 4.302653 * math.log(2) / math.sqrt(3)
    assert (low, high) == pytest.approx((2 * math.exp(-half), 2 * math.exp(half)))
    assert paired_ratio([1], [1]) is None
    assert paired_ratio([1, 0], [1, 1]) is None


def test_equal_artifacts_are_called_different_one_time_in_twenty():
    rng = np.random.default_rng(3)
    for rounds in (3, 5):
        wrong = sum(told_apart(*rng.lognormal(3, 0.05, (2, rounds))) for _ in range(2000))
        assert 0.035 < wrong / 2000 < 0.065


def test_pairing_sees_through_a_drift_that_hides_the_difference():
    drift = np.array([1.0, 1.4, 0.8, 1.2, 0.6])
    fast, slow = 100 * drift, 97 * drift * np.array([1.001, 0.999, 1.0, 1.002, 0.998])
    assert told_apart(fast, slow)
    assert not told_apart(fast, slow[[1, 2, 3, 4, 0]])  # the same numbers, not paired


FAST, NEAR, SLOW = [100, 101, 99, 100, 102], [99, 102, 100, 98, 101], [50, 51, 49, 50, 52]


def test_ranks_are_shared_where_rounds_cannot_tell():
    assert ranks([SLOW, FAST, NEAR]) == [3, 1, 1]
    assert ranks([FAST, SLOW]) == [1, 2]
    assert ranks([FAST]) == [1]
    assert ranks([[1.0], [2.0]]) == [None, None]
    assert ranks([]) == []


def test_a_rank_begins_only_where_all_above_differ_from_all_below():
    # The wobbly one is told apart from nobody, so nobody may be ranked across it.
    wobbly = [40, 160, 75, 200, 30]
    assert not told_apart(FAST, wobbly) and not told_apart(SLOW, wobbly)
    assert told_apart(FAST, SLOW)
    assert ranks([FAST, wobbly, SLOW]) == [1, 1, 1]
