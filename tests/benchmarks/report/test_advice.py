"""Advice by hand: each rule decides one case, and the sentence has the figures that decided."""

from typing import Any

import pytest

from benchmarks.report.advice import advise_profile, need
from benchmarks.report.document import make_report
from tests.benchmarks.sample_report import PROFILES, full_evaluation, full_fidelity, full_result

PHONE = {"name": "phone", "memory_bytes": 1_500_000_000, "context": 2048, "threads": 4}
THIS = {"name": "this", "memory_bytes": 16_000_000_000, "context": None}
SETTINGS = {"context": 512}


def row(
    name: str, megabytes: float, speed: float | None = None, kl: float | None = None, **more: Any
) -> dict:
    """An export that needs so many megabytes and would decode so fast on the phone."""
    return {
        "artifact": f"out/{name}",
        "name": name,
        "format": "gguf",
        "bytes": int(megabytes * 1e6),
        "peak_rss_bytes": int(megabytes * 1e6),
        "decode_tokens_per_s": speed,
        "mean_kl_nats": kl,
        "projections": [{"profile": "phone", "decode_tokens_per_s": speed}] if speed else [],
        **more,
    }


def advice(*rows: dict, profile: dict = PHONE) -> tuple[str | None, str]:
    found = advise_profile(rows, profile, SETTINGS)
    assert found["profile"] == profile["name"]
    return found["name"], found["sentence"]


def test_what_does_not_fit_is_not_shipped() -> None:
    name, sentence = advice(row("large", 1501, 50, 1e-4), row("small", 900, 30, 0.01))
    assert name == "small"
    assert sentence == (
        "Ship small: it alone fits, with 900 of 1,500 MB, runs at about 30.0 tok/s (projected), and keeps "
        "the model's quality (mean KL 0.01 nats)."
    )


def test_of_what_fits_the_fastest() -> None:
    name, sentence = advice(
        row("slow", 1000, 20, 0.001), row("fast", 1200, 30, 0.02), row("huge", 9999, 90, 0)
    )
    assert name == "fast"
    assert "is the fastest of the 2 to choose from at about 30.0 tok/s (projected)" in sentence


def test_the_fastest_is_passed_over_when_it_has_lost_too_much() -> None:
    name, sentence = advice(row("good", 1000, 20, 0.02), row("bad", 600, 40, 0.3))
    assert name == "good"
    assert sentence.endswith(
        "; bad is faster but is too far from the reference (mean KL 0.3 nats, over 0.1)."
    )


def test_a_kl_whose_interval_reaches_below_the_limit_is_not_called_lost() -> None:
    unsure = row("unsure", 600, 40, 0.11, mean_kl_se_nats=0.01)
    assert advice(row("good", 1000, 20, 0.02), unsure)[0] == "unsure"
    assert advice(row("good", 1000, 20, 0.02), unsure | {"mean_kl_se_nats": 0.001})[0] == "good"


def grades(verdict: str) -> list[dict]:
    paired = {"with": "torch:fox", "verdict": verdict, "p": 0.5}
    return [{"task": "gsm8k", "n": 50, "correct": 20, "ci95_percent": [27.6, 53.8], "paired": paired}]


def test_fewer_right_answers_count_when_the_paired_test_tells_them() -> None:
    fast = row("fast", 600, 40, 0.02, tasks=grades("worse"))
    name, sentence = advice(row("good", 1000, 20, 0.01, tasks=grades("not told apart")), fast)
    assert name == "good"
    assert "gsm8k 20 of 50 right, not told apart from torch:fox" in sentence
    assert sentence.endswith("; fast is faster but gives fewer right answers to gsm8k than torch:fox.")
    assert advice(row("good", 1000, 20, 0.01), fast | {"tasks": grades("not told apart")})[0] == "fast"


def test_when_all_have_lost_too_much_the_closest_is_named_with_a_warning() -> None:
    name, sentence = advice(row("a", 600, 40, 0.5), row("b", 700, 20, 0.2))
    assert name == "b"
    assert sentence == (
        "Ship b only if you must: it needs 700 of 1,500 MB and runs at about 20.0 tok/s (projected), but it "
        "is too far from the reference (mean KL 0.2 nats, over 0.1)."
    )


def test_projections_nearer_than_five_percent_are_told_apart_by_fidelity() -> None:
    name, sentence = advice(row("quick", 900, 30, 0.02), row("close", 1000, 29, 0.01))
    assert name == "close"
    assert "not told apart from quick in speed but closer to the reference" in sentence
    assert advice(row("quick", 900, 30, 0.02), row("close", 1000, 28.4, 0.01))[0] == "quick"


def test_what_cannot_be_told_apart_at_all_is_said_and_the_smallest_is_shipped() -> None:
    rows = [row(n, mb, 30, 0.02, mean_kl_se_nats=0.002) for n, mb in (("a", 900), ("b", 800), ("c", 1000))]
    rows[0]["mean_kl_nats"] = 0.019
    name, sentence = advice(*rows)
    assert name == "b"
    assert "not told apart from a and c in speed or fidelity but the smallest" in sentence


def test_this_machine_is_advised_by_what_was_measured_not_by_projections() -> None:
    fast = row("fast", 900, 30, 0.02, interval={"decode_tokens_per_s": [29, 31]})
    slow = row("slow", 900, 25, 0.01, interval={"decode_tokens_per_s": [24, 26]})
    name, sentence = advice(fast, slow, profile=THIS)
    assert name == "fast" and "at 30.0 tok/s (measured)" in sentence and "projected" not in sentence
    slow["interval"]["decode_tokens_per_s"] = [24, 29.5]
    assert advice(fast, slow, profile=THIS)[0] == "slow"


def test_ranks_that_the_bench_shares_are_believed() -> None:
    fast = row("fast", 900, 30, 0.02, rank=1, rank_shared_with=["out/close"])
    close = row("close", 950, 20, 0.01, rank=1, rank_shared_with=["out/fast"])
    assert advice(fast, close, profile=THIS)[0] == "close"
    assert advice(fast | {"rank_shared_with": []}, close, profile=THIS)[0] == "fast"


def test_projections_of_what_is_not_told_apart_here_are_not_told_apart_there() -> None:
    fast = row("fast", 900, 30, 0.02, interval={"decode_tokens_per_s": [24, 36]})
    slow = row("slow", 900, 20, 0.01, interval={"decode_tokens_per_s": [16, 25]})
    assert advice(fast, slow)[0] == "slow"
    slow["interval"]["decode_tokens_per_s"] = [19, 21]
    assert advice(fast, slow)[0] == "fast"
    assert advice(fast | {"rank": 1, "rank_shared_with": ["out/slow"]}, slow)[0] == "slow"


def test_one_round_tells_no_speeds_apart() -> None:
    fast, slow = (
        row("fast", 900, 60, 0.02, runs=1, rank=None, rank_shared_with=[]),
        row("slow", 900, 20, 0.01),
    )
    assert advice(fast, slow)[0] == advice(fast, slow, profile=THIS)[0] == "slow"


def test_a_device_that_nobody_projected_gets_no_speed_from_this_machine() -> None:
    name, sentence = advice(row("a", 900, None, 0.02, decode_tokens_per_s=99.0))
    assert name == "a" and "99" not in sentence and "a speed there that nobody knows" in sentence


def test_a_run_under_the_profile_is_a_measurement_for_it() -> None:
    found = row("a", 900, None, 0.02, profile="phone", decode_tokens_per_s=12.0)
    assert "runs at 12.0 tok/s (measured)" in advice(found)[1]
    assert "12.0 tok/s" not in advice(found, profile=THIS)[1]


def test_without_fidelity_the_sentence_says_so() -> None:
    assert advice(row("a", 900, 30))[1].endswith(
        ", and nothing is known of its fidelity (--checkpoint measures it)."
    )


def reckoned(total: int, **parts: int) -> list[dict]:
    return [{"profile": "phone", "context": 2048, "total_bytes": total * 10**6} | parts]


def test_none_fits_with_the_sum() -> None:
    parts = {"weights_bytes": 1_400_000_000, "kv_bytes": 134_000_000, "buffers_bytes": 66_000_000}
    name, sentence = advice(
        row("a", 1450, 30, 0.01, memory=reckoned(1600, **parts)), row("b", 2000, 20, 0.01)
    )
    assert name is None
    assert sentence == (
        "None fits: the smallest, a, needs weights 1,400 + KV cache 134 + buffers 66 = 1,600 MB at 2,048 "
        "tokens of context, 100 MB more than the 1,500 MB that can be had there."
    )
    assert advice(row("b", 2000, 20, 0.01))[1] == (
        "None fits: the smallest, b, needs 2,000 MB as measured here, 500 MB more than the 1,500 MB that can "
        "be had there."
    )


def test_none_fits_in_the_words_of_whoever_made_the_sum() -> None:
    said = "does not fit phone: at 2,048 tokens 1.4 GB of weights = 1.6 GB, but 1.5 GB can be had there"
    projection = {"profile": "phone", "needed_bytes": 16 * 10**8, "fits": False, "source": said}
    name, sentence = advice(row("a", 1450, None, 0.01, projections=[projection]))
    assert name is None and sentence == f"None fits: the smallest, a, {said}."


def test_runs_that_failed_are_no_candidates() -> None:
    dead = {"artifact": "x", "name": "x", "format": "onnx", "error": "killed at 1,500 MB."}
    assert advice(dead, row("a", 900, 30, 0.01))[0] == "a"
    assert advice(dead)[1] == ("None of 1 exports can be shipped on what is known: x: killed at 1,500 MB.")


def test_the_reference_is_no_export() -> None:
    name, sentence = advice(row("torch", 100, 99, 0.0) | {"format": "torch"})
    assert name is None and sentence == "No export was measured, so there is none to ship."


def test_memory_is_what_was_reckoned_for_the_context_or_measured_at_no_longer_one() -> None:
    found = row("a", 1000, memory=reckoned(900))
    assert need(found, PHONE, {"context": 512}).bytes == 1000 * 10**6  # measured more, and at less
    assert need(found, PHONE, {"context": 8192}).bytes == 900 * 10**6  # measured at a longer one
    assert need(row("a", 800, memory=reckoned(900)), PHONE, SETTINGS).bytes == 900 * 10**6
    assert need({"artifact": "a"}, PHONE, SETTINGS).bytes is None


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p["name"])
def test_the_sample_report(profile: dict) -> None:
    """By hand from the sample's table: what is below the cap, has kept quality, and is fastest within 5 %."""
    report = make_report(
        full_result(),
        checkpoint="fox",
        fidelity=full_fidelity(),
        evaluations=[full_evaluation()],
        profiles=PROFILES,
    )
    found = next(a for a in report["advice"] if a["profile"] == profile["name"])
    # gguf-tiny is fastest everywhere but worse at gsm8k; onnx-int4 and gguf-phone are within 5 %, and
    # gguf-phone is closer. Peaks: gguf-phone 1,209 MB, onnx-int4 1,240, gguf-tiny 820.
    wanted = {"phone-8gb": "gguf-phone", "phone-4gb": "gguf-phone", "pi5": "gguf-tiny", "this": "gguf-phone"}
    assert found["name"] == wanted[profile["name"]]
    assert ("only if you must" in found["sentence"]) == (profile["name"] == "pi5")
