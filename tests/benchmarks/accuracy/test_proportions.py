"""Intervals and tests of differences, beside brute force: every outcome counted, likelihoods searched."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.accuracy.proportions import (
    bootstrap_percent,
    compare,
    mcnemar_p,
    questions_needed,
    sign_flip_p,
    tango_percent,
    tango_score,
    wilson_percent,
)


def answers(won: int, lost: int, both: int = 0, neither: int = 0) -> tuple[list[int], list[int]]:
    """(reference, other): the other alone is right `won` times."""
    pairs = [(0, 1)] * won + [(1, 0)] * lost + [(1, 1)] * both + [(0, 0)] * neither
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


# --- one share, and disagreements ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # 8 of 10 by hand: (0.8 + 0.19207 -+ 1.95996 sqrt(0.016 + 0.0096036)) / 1.384146 = 0.4902, 0.9433
    [(8, 10, 49.02, 94.33), (0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (50, 100, 40.38, 59.62)],
)
def test_wilson_intervals(correct, n, low, high):
    assert wilson_percent(correct, n) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_mcnemar_by_hand():
    # 8 disagreements, 1 against 7: two-sided 2 (C(8,0) + C(8,1)) / 2^8 = 18 / 256
    first = [True] * 7 + [False] + [True] * 5 + [False] * 4
    second = [False] * 7 + [True] + [True] * 5 + [False] * 4
    assert mcnemar_p(first, second) == mcnemar_p(second, first) == 18 / 256
    assert mcnemar_p(first, first) == 1
    assert mcnemar_p([True, False], [False, True]) == 1


# --- Tango's interval -----------------------------------------------------------------------------


@pytest.mark.parametrize(("won", "lost", "n"), [(7, 2, 40), (0, 3, 20), (5, 5, 50), (12, 1, 13)])
def test_tango_s_ends_are_where_the_score_test_stops_rejecting(won, lost, n):
    """The variance under each difference from the likelihood itself, searched on a fine grid."""
    for end in tango_percent(won, lost, n):
        difference = end / 100
        lost_shares = np.linspace(max(0, -difference), (1 - difference) / 2, 400_001)[1:-1]
        won_shares = lost_shares + difference
        same = 1 - lost_shares - won_shares
        likelihood = (n - won - lost) * np.log(np.maximum(same, 1e-300)) + (
            won * np.log(np.maximum(won_shares, 1e-300)) + lost * np.log(np.maximum(lost_shares, 1e-300))
        )
        share = lost_shares[likelihood.argmax()]
        variance = n * (2 * share + difference - difference**2)
        assert abs(won - lost - n * difference) / math.sqrt(variance) == pytest.approx(1.96, abs=0.01)


def test_tango_at_no_difference_is_mcnemar_s_statistic():
    assert tango_score(7, 2, 40, 0.0) == pytest.approx((7 - 2) / math.sqrt(9))


def test_tango_is_as_wide_as_the_questions_are_few():
    for n in (5, 10, 100, 1000):
        low, high = tango_percent(0, 0, n)
        assert low == pytest.approx(-high) and 0 < high < 100
        # Of no disagreement in n: 1.96^2 / (n + 1.96^2), as Wilson's interval of 0 of n.
        assert high == pytest.approx(100 * 1.96**2 / (n + 1.96**2), rel=1e-3)
    assert tango_percent(10, 0, 10)[1] == pytest.approx(100)
    assert tango_percent(3, 9, 50) == pytest.approx([-x for x in reversed(tango_percent(9, 3, 50))])


def test_tango_holds_the_truth_about_95_times_of_100():
    """Over every outcome of 25 questions, weighed by its probability."""
    n, won_share, lost_share = 25, 0.18, 0.08
    held = total = 0.0
    for won in range(n + 1):
        for lost in range(n + 1 - won):
            rest = n - won - lost
            weight = (
                math.comb(n, won)
                * math.comb(n - won, lost)
                * won_share**won
                * lost_share**lost
                * (1 - won_share - lost_share) ** rest
            )
            total += weight
            low, high = tango_percent(won, lost, n)
            held += weight * (low <= 100 * (won_share - lost_share) <= high)
    assert total == pytest.approx(1)
    assert 0.935 < held < 0.97


# --- scores between right and wrong ---------------------------------------------------------------


def test_signs_drawn_at_random_are_about_all_signs():
    differences = np.array([0.3, -0.1, 0.4, 0.2, 0.5, -0.05, 0.25, 0.3])
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean()
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.008)
    assert sign_flip_p(np.zeros(5)) == 1


def test_the_bootstrap_is_about_its_normal_limit_and_always_the_same():
    differences = np.random.default_rng(1).normal(0.1, 0.5, 900)
    low, high = bootstrap_percent(differences)
    error = differences.std() / math.sqrt(900)
    assert low == pytest.approx(100 * (differences.mean() - 1.96 * error), abs=0.25)
    assert high == pytest.approx(100 * (differences.mean() + 1.96 * error), abs=0.25)
    assert bootstrap_percent(differences) == (low, high)


def test_the_bootstrap_of_right_and_wrong_is_the_binomial_s():
    """One of two outcomes, 1 with 3 of 10: the 2.5 and 97.5 percentiles of binomial(10, 0.3) / 10."""
    differences = np.array([1.0] * 3 + [0.0] * 7)
    below = np.cumsum([math.comb(10, k) * 0.3**k * 0.7 ** (10 - k) for k in range(11)])
    wanted = [10 * int(np.searchsorted(below, q)) for q in (0.025, 0.975)]
    assert list(bootstrap_percent(differences)) == wanted


# --- what it comes to -----------------------------------------------------------------------------


def test_a_clear_winner_and_a_clear_loser():
    reference, other = answers(won=14, lost=2, both=20, neither=14)
    found = compare(reference, other)
    assert (found.verdict, found.questions_to_settle) == ("better", 0)
    assert found.p == mcnemar_p([bool(x) for x in reference], [bool(x) for x in other]) < 0.05
    assert found.difference_percent == 24 and found.interval_percent[0] > 0
    back = compare(other, reference)
    assert back.verdict == "worse"
    assert back.interval_percent == pytest.approx([-x for x in reversed(found.interval_percent)])


def test_nobody_wins_that_only_one_of_test_and_interval_names():
    found = compare(*answers(won=5, lost=0, both=45))
    assert found.interval_percent[0] > 0 and found.p == 2 / 32  # the exact test is the stricter one here
    assert found.verdict == "not told apart"
    assert found.questions_to_settle is not None and found.questions_to_settle > 0


def test_equal_answers_are_equal_and_no_number_of_questions_is_promised():
    found = compare(*answers(won=0, lost=0, both=7, neither=3))
    assert (found.p, found.difference_percent, found.verdict) == (1, 0, "not told apart")
    assert found.questions_to_settle is None
    assert found.interval_percent[0] < 0 < found.interval_percent[1]
    assert found.bootstrap_percent == (0, 0)  # why the bootstrap is not what decides


def test_so_many_questions_settle_it_4_times_of_5():
    """The normal approximation's promise, kept by the exact test on drawn answers of that many questions."""
    won, lost = 0.12, 0.06
    n = math.ceil(questions_needed(won + lost, won - lost))
    rng = np.random.default_rng(5)
    told = 0
    for drawn in rng.multinomial(n, [won, lost, 1 - won - lost], 400):
        tail = sum(math.comb(int(drawn[0] + drawn[1]), k) for k in range(min(drawn[:2]) + 1))
        told += 2 * tail / 2 ** int(drawn[0] + drawn[1]) < 0.05
    assert 0.7 < told / 400 < 0.88
    assert questions_needed(0.2, 0.0) is None


def test_more_questions_are_those_beyond_the_asked_ones():
    found = compare(*answers(won=6, lost=3, both=21, neither=20))
    assert found.verdict == "not told apart"
    assert found.questions_to_settle == math.ceil(questions_needed(9 / 50, 3 / 50)) - 50


def test_scores_are_compared_too():
    rng = np.random.default_rng(2)
    reference = rng.uniform(0.2, 0.6, 200)
    better = compare(reference, reference + rng.normal(0.05, 0.1, 200))
    assert (better.verdict, better.questions_to_settle) == ("better", 0)
    assert better.difference_percent == pytest.approx(5, abs=2.5) and "bootstrap" in better.method
    same = compare(reference, reference + rng.normal(0.0005, 0.1, 200))
    assert same.verdict == "not told apart" and same.questions_to_settle > 100
    equal = compare(reference, reference)
    assert (equal.verdict, equal.questions_to_settle, equal.p) == ("not told apart", None, 1)
    assert all(isinstance(value, int | float | str | list) for value in same.to_json().values())
