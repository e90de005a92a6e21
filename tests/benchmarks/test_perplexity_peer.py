"""What llama-perplexity's 16 bits do to figures, by hand, and the reading of what it prints."""

import math

import numpy as np
import pytest

from benchmarks.fidelity.divergence import kl_nats
from benchmarks.fidelity.texts import Windows
from benchmarks.fidelity_cost import medians
from benchmarks.perplexity_peer import (
    as_stored,
    check_tokens,
    compared,
    parse_report,
    rounded_figures,
    stored_divergence,
)
from fox_edge.errors import FoxEdgeError

# As the program prints it; figures made up.
REPORT = """\
====== Perplexity statistics ======
Mean PPL(Q)                   :   2.500000 ±   0.050000
Mean PPL(base)                :   2.400000 ±   0.040000
Cor(ln(PPL(Q)), ln(PPL(base))):  99.10%
Mean ln(PPL(Q)/PPL(base))     :   0.040822 ±   0.002000
Mean PPL(Q)/PPL(base)         :   1.041667 ±   0.002083
Mean PPL(Q)-PPL(base)         :   0.100000 ±   0.005000

====== KL divergence statistics ======
Mean    KLD:   0.011000 ±   0.000500
Maximum KLD:   0.900000
99.9%   KLD:   0.500000
99.0%   KLD:   0.125000
Median  KLD:   0.001500
Minimum KLD:  -0.000010

====== Token probability statistics ======
RMS Δp    :  3.100 ± 0.120 %
Same top p: 96.500 ± 0.300 %
"""


def test_the_printed_figures_are_read():
    assert parse_report(REPORT) == {
        "perplexity": 2.5,
        "reference_perplexity": 2.4,
        "perplexity_ratio": 1.041667,
        "perplexity_ratio_se": 0.002083,
        "mean_kl_nats": 0.011,
        "mean_kl_se_nats": 0.0005,
        "max_kl_nats": 0.9,
        "p99_kl_nats": 0.125,
        "median_kl_nats": 0.0015,
        "top1_agreement_percent": 96.5,
        "top1_se_percent": 0.3,
    }
    with pytest.raises(FoxEdgeError, match="printed no 'Mean    KLD'"):
        parse_report(REPORT.replace("Mean    KLD", "Nothing"))


def test_a_stored_row_by_hand():
    # 20 nats below the top is beyond the 16 that are kept: the least step, and left out of every sum.
    stored = as_stored(np.array([4.0, 0.0, -4.0, -16.0], np.float32))
    assert float(stored.scale) == pytest.approx(16 / 65535)
    assert stored.steps.tolist() == [65535, 49151, 32768, 0]  # 4 nats are 16383.75 steps
    log_mass = math.log(1 + math.exp(-4) + math.exp(-8) + math.exp(-20))
    assert stored.log_p()[0] == pytest.approx(-log_mass, abs=1e-5)
    assert stored.log_p()[1] == pytest.approx(-4 - log_mass, abs=16 / 65535)
    assert stored.log_p()[3] < -16


def test_rows_that_all_say_the_same_are_stored_without_a_step():
    stored = as_stored(np.zeros(4, np.float32))
    assert stored.scale == 0 and np.exp(stored.log_p()) == pytest.approx(0.25)
    assert stored_divergence(stored, np.zeros(4, np.float32)) == pytest.approx(0, abs=1e-6)


def test_rounding_moves_a_divergence_by_less_than_a_step():
    rng = np.random.default_rng(0)
    for noise in (0.01, 0.3):
        a = (rng.normal(size=8192) * 4).astype(np.float32)
        b = a + (rng.normal(size=8192) * noise).astype(np.float32)
        assert stored_divergence(as_stored(a), b) == pytest.approx(kl_nats(a, b), abs=16 / 65535)


def test_tokens_that_are_not_ours_are_told(tmp_path):
    base, text = tmp_path / "base.kld", Windows("", [[9, 1, 2], [9, 3, 4]], 1)

    def write(*numbers):
        base.write_bytes(b"_logits_" + np.array(numbers, np.int32).tobytes() + b"log-probabilities")
        return check_tokens(base, text)

    write(3, 50, 2, 7, 1, 2, 8, 3, 4)  # <bos> stands for 7 and 8
    with pytest.raises(FoxEdgeError, match="1 of 4 tokens are not the checkpoint's"):
        write(3, 50, 2, 9, 1, 2, 9, 5, 4)
    with pytest.raises(FoxEdgeError, match="1 windows of 6 tokens, not 2 of 3"):
        write(6, 50, 1, 9, 1, 2, 9, 3, 4)


def test_both_sides_make_a_row_of_differences():
    rng = np.random.default_rng(1)
    text = Windows("", rng.integers(0, 50, (2, 6)).tolist(), 3)
    a = rng.normal(size=(4, 50)).astype(np.float32)
    rounded = rounded_figures(iter([a]), iter([a[:3], a[3:]]), text)
    assert rounded["mean_kl_nats"] == pytest.approx(0, abs=1e-3)
    assert rounded["top1_agreement_percent"] == 100
    assert rounded["perplexity_ratio"] == pytest.approx(1, abs=1e-3)
    theirs = parse_report(REPORT)
    ours = {key: value + 0.5 for key, value in theirs.items()}
    row = compared("nano", {**ours, "rounded": rounded}, theirs)
    assert row["difference"] == pytest.approx(dict.fromkeys(theirs, 0.5))
    assert row["relative_mean_kl"] == pytest.approx(0.511 / 0.011 - 1)
    assert row["rounded_difference"]["mean_kl_nats"] == pytest.approx(rounded["mean_kl_nats"] - 0.011)


def test_the_cost_counts_every_process_above_the_artifact_s_own():
    def found(ratio, peak):
        return {
            "ratio": ratio,
            "fidelity_peak_rss_bytes": peak,
            "layers_peak_rss_bytes": 700,
            "artifact_forward_peak_rss_bytes": 500,
            "command_rss_bytes": 100,
        }

    row = medians("work/int4", [found(1.2, 900), found(1.4, 900), found(1.1, 900)])
    assert (row["artifact"], row["ratio"], row["above_models_bytes"]) == ("int4", 1.2, 500)
    assert row["reached"] == {"time": True, "memory": True} and len(row["rounds"]) == 3
    large = medians("int4", [found(1.31, 10**9 + 500)])
    assert large["reached"] == {"time": False, "memory": False}
    # The layers' process may be the larger one.
    assert medians("int4", [found(1, 600)])["above_models_bytes"] == 300
