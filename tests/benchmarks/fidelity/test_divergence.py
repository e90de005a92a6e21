"""Divergences by hand and beside plain float64 formulas, streams that do not match, bounded memory."""

import math

import numpy as np
import pytest
import torch

from benchmarks.fidelity import divergence
from benchmarks.fidelity.divergence import (
    Positions,
    compare,
    curve,
    kl_nats,
    likeliest,
    look,
    perplexities,
    quantile_error,
    reference_text,
    standard_error,
)
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import VerificationError


def row(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


def wide(rows: int, columns: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits as wide as a trained model's, and others near them."""
    rng = np.random.default_rng(seed)
    a = (rng.normal(size=(rows, columns)) * 5).astype(np.float32)
    return a, a + (rng.normal(size=a.shape) * noise).astype(np.float32)


def log_softmax(rows: np.ndarray) -> np.ndarray:
    """The plain formula in float64."""
    x = rows.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def plain_kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    p, q = log_softmax(a), log_softmax(b)
    return (np.exp(p) * (p - q)).sum(1)


# --- one position ------------------------------------------------------------------------------------


def test_kl_of_two_distributions_by_hand():
    # 0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75) = 0.5 ln 2 + 0.5 ln(2/3)
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_nats(row(0.5, 0.5), row(0.25, 0.75)) == pytest.approx(expected, rel=1e-6)


def test_kl_does_not_depend_on_a_shift_of_the_logits():
    a, b = row(0.7, 0.2, 0.1), row(0.6, 0.3, 0.1)
    assert kl_nats(a + 100, b - 50) == pytest.approx(kl_nats(a, b), rel=1e-4)


@pytest.mark.parametrize("noise", [1, 0.05, 1e-3])
def test_kl_is_the_float64_formula_s_from_far_apart_to_all_but_equal(noise):
    a, b = wide(8, 5000, noise)
    found = look([a], [b]).kl_nats
    assert found == pytest.approx(plain_kl(a, b), rel=1e-6)


def test_equal_rows_diverge_by_nothing():
    a = np.random.default_rng(1).normal(size=256_000).astype(np.float32) * 20
    assert kl_nats(a, a.copy()) == 0


@pytest.mark.parametrize("columns", [3, 700, 512 * 6, 512 * 9 + 77])
def test_the_likeliest_tokens_are_those_that_sorting_finds(columns):
    a, _ = wide(20, columns, 0)
    count = min(5, columns)
    found = np.sort(likeliest(torch.from_numpy(a), count).numpy(), 1)
    assert np.array_equal(found, np.sort(np.argsort(a, 1)[:, -count:], 1))


def test_shares_of_the_likeliest_by_hand():
    a = np.array([[9, 8, 7, 6, 5, 0, 0, 0]], np.float32)
    b = np.array([[8, 9, 0, 0, 5, 6, 7, 0]], np.float32)  # three of the five, another one first
    found = look([a], [b])
    assert found.shared.tolist() == [0.6] and found.same_first.tolist() == [False]
    assert look([a], [a]).shared.tolist() == [1.0]


def test_of_equally_likely_tokens_the_first_is_the_choice():
    tie, clear = np.array([[1, 1, 0]], np.float32), np.array([[1, 0.5, 0]], np.float32)
    assert look([tie], [clear]).same_first.all() and look([clear], [tie]).same_first.all()


# --- streams -------------------------------------------------------------------------------------------


def test_summary_over_positions_whatever_the_chunks():
    same, other = row(0.7, 0.3), row(0.3, 0.7)
    reference = [np.stack([same] * 60), np.stack([same] * 40)]
    rows = np.stack([same] * 95 + [other] * 5)
    fidelity = compare(reference, iter([rows[:7], rows[7:93], rows[93:93], rows[93:]]))
    one = 0.7 * math.log(7 / 3) - 0.3 * math.log(7 / 3)
    assert fidelity.positions == 100
    assert fidelity.mean_kl_nats == pytest.approx(0.05 * one, rel=1e-6)
    assert fidelity.median_kl_nats == pytest.approx(0, abs=1e-12)
    assert fidelity.p99_kl_nats == fidelity.max_kl_nats == pytest.approx(one, rel=1e-6)
    assert fidelity.top1_agreement_percent == 95.0
    # 5 of 100 positions are `one`, the others 0: sqrt(0.05 * 0.95 / 99) of it
    assert fidelity.mean_kl_se_nats == pytest.approx(one * math.sqrt(0.05 * 0.95 / 99), rel=1e-6)
    assert fidelity.top1_se_percent == pytest.approx(100 * math.sqrt(0.05 * 0.95 / 99))
    keys = {"mean_kl_nats", "p99_kl_nats", "top1_agreement_percent", "positions"}
    assert keys <= set(fidelity.to_json())


def test_no_figure_depends_on_where_chunks_end_or_how_large_blocks_are(monkeypatch):
    a, b = wide(50, 6000, 0.3)
    targets = np.random.default_rng(5).integers(0, 6000, 50).tolist()
    at_once = look([a], [b], targets)
    monkeypatch.setattr(divergence, "_BLOCK", 1000)
    monkeypatch.setattr(divergence, "_GROUP", 100)
    in_pieces = look(np.split(a, [1, 17, 18, 49]), np.split(b, [16, 32, 48]), targets)
    for name in Positions.__dataclass_fields__:
        assert getattr(in_pieces, name) == pytest.approx(getattr(at_once, name), rel=1e-12), name


def test_a_chunk_is_done_with_when_the_next_is_asked_for():
    a, b = wide(30, 100, 0.3)

    def reused(rows, size):
        buffer = np.empty((size, 100), np.float32)
        for start in range(0, 30, size):
            buffer[:] = rows[start : start + size]
            yield buffer

    assert np.array_equal(look(reused(a, 10), reused(b, 3)).kl_nats, look([a], [b]).kl_nats)


@pytest.mark.parametrize(
    ("reference", "artifact", "message"),
    [
        ([np.zeros((3, 4))], [np.zeros((2, 4))], "for 2 positions"),
        ([np.zeros((2, 4))], [np.zeros((2, 4)), np.zeros((1, 4))], "more than the 2"),
        ([np.zeros((2, 4))], [np.zeros((2, 5))], "5 logits per position, the reference 4"),
        ([np.zeros((2, 4))], [np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]])], "position 1"),
        ([np.zeros((1, 4))] * 2, [np.zeros((1, 4)), np.full((1, 4), np.nan)], "position 1"),
        ([np.zeros((1, 4))], [np.array([[0, -np.inf, 0, 0]])], "position 0: .* inf"),
        ([], [], "no positions"),
    ],
)
def test_streams_that_do_not_match_are_refused(reference, artifact, message):
    with pytest.raises(VerificationError, match=message):
        compare([np.float32(c) for c in reference], [np.float32(c) for c in artifact])


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation makes, views of what was there left out."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return out


def test_nothing_as_large_as_a_chunk_is_made_beside_it():
    a, b = wide(16, 256_000, 0.1)
    with Allocations() as seen:
        look([a], [b], [7] * 16)
    assert 8 * divergence._BLOCK <= seen.largest <= 9 * divergence._BLOCK < a.nbytes / 10


# --- figures over all positions ---------------------------------------------------------------------------


def test_perplexities_beside_the_plain_formula():
    a, b = wide(40, 300, 0.4)
    targets = np.random.default_rng(3).integers(0, 300, 40)
    found = perplexities(look([a[:9], a[9:]], [b], targets.tolist()))
    mine, other = (-log_softmax(x)[np.arange(40), targets] for x in (a, b))
    assert found["reference_perplexity"] == pytest.approx(np.exp(mine.mean()))
    assert found["perplexity"] == pytest.approx(np.exp(other.mean()))
    ratio = np.exp((other - mine).mean())
    assert found["perplexity_ratio"] == pytest.approx(ratio)
    # As llama-perplexity has it, from the two variances and the covariance of the means.
    variance = (np.var(other) + np.var(mine) - 2 * np.cov(other, mine, ddof=0)[0, 1]) / 39
    assert found["perplexity_ratio_se"] == pytest.approx(ratio * math.sqrt(variance))


def test_perplexity_of_a_fair_coin_is_two():
    found = perplexities(look([np.stack([row(0.5, 0.5)] * 3)], [np.stack([row(0.25, 0.75)] * 3)], [0, 0, 0]))
    assert found["reference_perplexity"] == pytest.approx(2)
    assert found["perplexity"] == pytest.approx(4)
    assert found["perplexity_ratio"] == pytest.approx(2)
    assert found["perplexity_ratio_se"] == pytest.approx(0, abs=1e-9)


def test_the_curve_s_buckets_cover_every_position_once():
    kl = np.array([[0.0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])
    assert curve(kl, first=10, buckets=2) == [
        {"from": 10, "to": 13, "mean_kl_nats": 2.0, "mean_kl_se_nats": pytest.approx(math.sqrt(2 / 6))},
        {"from": 13, "to": 15, "mean_kl_nats": 4.5, "mean_kl_se_nats": pytest.approx(math.sqrt(5 / 3) / 2)},
    ]
    whole = curve(np.arange(255.0)[None], first=256)
    assert [b["from"] for b in whole] == list(range(256, 511, 32)) and whole[-1]["to"] == 511


def test_standard_errors_are_the_spread_of_repeated_samples():
    rng = np.random.default_rng(0)
    samples = rng.exponential(size=(400, 500))
    assert np.mean([standard_error(s) for s in samples]) == pytest.approx(samples.mean(1).std(), rel=0.1)
    for share in (0.5, 0.99):
        spread = np.quantile(samples, share, axis=1).std()
        assert np.mean([quantile_error(s, share) for s in samples]) == pytest.approx(spread, rel=0.15)
    assert standard_error(np.array([3.0])) == 0


def test_the_built_in_text_is_long_enough_for_any_tokenizer():
    text = reference_text()
    assert text == reference_text()
    assert len(text) > 8_000
    assert len(Checkpoint.open("nano").tokenizer().encode(text)) > 1_000
