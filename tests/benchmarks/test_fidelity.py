"""Divergences computed by hand, and streams that do not match."""

import math

import numpy as np
import pytest

from benchmarks.fidelity import compare, kl_nats, reference_text
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import VerificationError


def row(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


def test_kl_of_two_distributions_by_hand():
    # 0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75) = 0.5 ln 2 + 0.5 ln(2/3)
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_nats(row(0.5, 0.5), row(0.25, 0.75)) == pytest.approx(expected, rel=1e-6)


def test_kl_does_not_depend_on_a_shift_of_the_logits():
    a, b = row(0.7, 0.2, 0.1), row(0.6, 0.3, 0.1)
    assert kl_nats(a + 100, b - 50) == pytest.approx(kl_nats(a, b), rel=1e-4)


def test_kl_agrees_with_plain_log_softmax_on_wide_logits():
    rng = np.random.default_rng(0)
    a = rng.normal(size=5000).astype(np.float32) * 8
    b = a + rng.normal(size=5000).astype(np.float32) * 0.05
    p = np.exp(np.float64(a)) / np.exp(np.float64(a)).sum()
    q = np.exp(np.float64(b)) / np.exp(np.float64(b)).sum()
    assert kl_nats(a, b) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-8)


def test_equal_rows_diverge_by_nothing():
    a = np.random.default_rng(1).normal(size=256_000).astype(np.float32) * 20
    assert kl_nats(a, a.copy()) == 0


def test_summary_over_positions_whatever_the_chunks():
    same, other = row(0.7, 0.3), row(0.3, 0.7)
    reference = [np.stack([same] * 60), np.stack([same] * 40)]
    rows = np.stack([same] * 95 + [other] * 5)
    fidelity = compare(reference, iter([rows[:7], rows[7:93], rows[93:]]))
    one = 0.7 * math.log(7 / 3) - 0.3 * math.log(7 / 3)
    assert fidelity.positions == 100
    assert fidelity.mean_kl_nats == pytest.approx(0.05 * one, rel=1e-6)
    assert fidelity.median_kl_nats == pytest.approx(0, abs=1e-12)
    assert fidelity.p99_kl_nats == fidelity.max_kl_nats == pytest.approx(one, rel=1e-6)
    assert fidelity.top1_agreement_percent == 95.0
    keys = {"mean_kl_nats", "p99_kl_nats", "top1_agreement_percent", "positions"}
    assert keys <= set(fidelity.to_json())


@pytest.mark.parametrize(
    ("reference", "artifact", "message"),
    [
        ([np.zeros((3, 4))], [np.zeros((2, 4))], "for 2 positions"),
        ([np.zeros((2, 4))], [np.zeros((2, 4)), np.zeros((1, 4))], "more than the 2"),
        ([np.zeros((2, 4))], [np.zeros((2, 5))], "5 logits per position, the reference 4"),
        ([np.zeros((2, 4))], [np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]])], "position 1"),
        ([np.zeros((1, 4))], [np.array([[0, -np.inf, 0, 0]])], "position 0: .* inf"),
        ([], [], "no positions"),
    ],
)
def test_streams_that_do_not_match_are_refused(reference, artifact, message):
    with pytest.raises(VerificationError, match=message):
        compare([np.float32(c) for c in reference], [np.float32(c) for c in artifact])


def test_the_built_in_text_is_long_enough_for_any_tokenizer():
    text = reference_text()
    assert text == reference_text()
    assert len(text) > 8_000
    assert len(Checkpoint.open("nano").tokenizer().encode(text)) > 1_000
