"""Two results by hand: ratios, intervals, verdicts, what is not comparable, and the exit status."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.compare import compare, compare_text
from benchmarks.report.document import make_report, write_report
from benchmarks.report.verdicts import ratio_interval
from fox_edge.cli import main
from fox_edge.errors import FoxEdgeError
from tests.benchmarks.sample_report import PROFILES, full_evaluation, full_fidelity, full_result

Saver = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Saver:
    """Writes a result and returns where."""

    def saver(name: str, result: dict[str, Any]) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(result), encoding="utf-8")
        return path

    return saver


def changed(result: dict[str, Any], row: int = 1, **figures: Any) -> dict[str, Any]:
    """A copy with other figures in one row; an interval moves with its figure."""
    copy: dict[str, Any] = json.loads(json.dumps(result))
    found = copy["results"][row]
    for key, value in figures.items():
        if key in found.get("interval", {}):
            factor = value / found[key]
            found["interval"][key] = [v * factor for v in found["interval"][key]]
        found[key] = value
    return copy


def figures(found: dict[str, Any], row: int = 1) -> dict[str, dict[str, Any]]:
    return {f["figure"]: f for f in found["results"][row]["figures"]}


def test_the_interval_of_a_ratio_by_hand() -> None:
    # 10 (9 to 11) and 20 (19 to 22): the distances in logarithms, squared and summed.
    low = math.hypot(math.log(20 / 19), math.log(11 / 10))
    high = math.hypot(math.log(22 / 20), math.log(10 / 9))
    assert ratio_interval(10, (9, 11), 20, (19, 22)) == pytest.approx(
        (2 * math.exp(-low), 2 * math.exp(high))
    )
    assert ratio_interval(10, (10, 10), 20, (20, 20)) == pytest.approx((2, 2))
    assert ratio_interval(10, None, 20, (19, 22)) is None
    assert ratio_interval(10, (0, 11), 20, (19, 22)) is None


def test_a_result_and_itself_differ_in_nothing(save: Saver) -> None:
    found = compare(save("a", full_result()), save("b", full_result()))
    assert (found["regressions"], found["improvements"], found["not_comparable"]) == (0, 0, 0)
    assert found["warnings"] == [] and len(found["results"]) == 7
    assert figures(found)["decode_tokens_per_s"]["ratio"] == 1
    assert figures(found)["decode_tokens_per_s"]["interval"][0] < 1


def test_slower_is_a_regression_and_faster_an_improvement(save: Saver) -> None:
    before = save("a", full_result())
    found = compare(before, save("b", changed(full_result(), decode_tokens_per_s=22.8 * 0.9)))
    figure = figures(found)["decode_tokens_per_s"]
    # Intervals of 0.97 to 1.02 of each: the ratio's is 0.9 x exp(-+ root of the summed squares).
    assert figure["verdict"] == "regression" and figure["change_percent"] == pytest.approx(-10)
    assert figure["interval"] == pytest.approx(
        [0.9 * math.exp(s * math.hypot(math.log(0.97), math.log(1.02))) for s in (-1, 1)]
    )
    assert (found["regressions"], found["improvements"]) == (1, 0)
    found = compare(before, save("c", changed(full_result(), decode_tokens_per_s=22.8 * 1.1)))
    assert (found["regressions"], found["improvements"]) == (0, 1)


def test_more_seconds_are_worse(save: Saver) -> None:
    found = compare(save("a", full_result()), save("b", changed(full_result(), load_s=3.0)))
    assert figures(found)["load_s"]["verdict"] == "regression"


def test_a_change_within_the_intervals_is_not_told_apart(save: Saver) -> None:
    found = compare(
        save("a", full_result()), save("b", changed(full_result(), decode_tokens_per_s=22.8 * 0.965))
    )
    assert figures(found)["decode_tokens_per_s"]["verdict"] == "not told apart"


def test_a_sure_but_tiny_change_is_within_the_tolerance(save: Saver) -> None:
    exact = {"interval": {"decode_tokens_per_s": [22.8, 22.8]}}
    a = save("a", changed(full_result(), **exact))
    b = save("b", changed(changed(full_result(), **exact), decode_tokens_per_s=22.3))
    assert figures(compare(a, b))["decode_tokens_per_s"]["verdict"] == "not told apart"
    assert figures(compare(a, b, tolerance_percent=1))["decode_tokens_per_s"]["verdict"] == "regression"


def test_bytes_need_no_interval_and_one_run_gives_none(save: Saver) -> None:
    once = changed(full_result(), interval={}, spread={"decode_tokens_per_s": [22.8, 22.8]}, runs=1)
    later = changed(once, bytes=1_900_000_000, decode_tokens_per_s=5.0, peak_rss_bytes=9 * 10**9)
    later["results"][1]["spread"] = {"decode_tokens_per_s": [5.0, 5.0]}
    found = figures(compare(save("a", once), save("b", later)))
    assert found["bytes"]["verdict"] == "regression" and found["bytes"]["interval"] is None
    assert found["decode_tokens_per_s"]["verdict"] == "not told apart"
    assert found["peak_rss_bytes"]["verdict"] == "not told apart"
    assert "(no interval)" in compare_text(compare(save("a", once), save("b", later)))


def test_another_machine_is_said_loudly_and_its_speed_is_not_judged(save: Saver) -> None:
    other = changed(full_result(), decode_tokens_per_s=5.0, bytes=1_900_000_000)
    other["machine"] |= {"cpu": "Another", "cores": 2}
    found = compare(save("a", full_result()), save("b", other))
    assert found["warnings"] == [
        "two different machines: cpu A <processor> & friends and Another, cores 8 and 2"
    ]
    seen = figures(found)
    assert seen["decode_tokens_per_s"]["verdict"] == "not comparable"
    assert seen["decode_tokens_per_s"]["ratio"] == pytest.approx(5 / 22.8)
    assert seen["bytes"]["verdict"] == "regression"  # of the artifact, not of the machine
    assert compare_text(found).startswith("NOT THE SAME: two different machines")


@pytest.mark.parametrize(
    ("key", "value"),
    [("workload", "long"), ("prompt_tokens", 99), ("page_cache", "cold"), ("threads", 4), ("context", 4096)],
)
def test_other_settings_are_not_judged(save: Saver, key: str, value: Any) -> None:
    other = changed(full_result(), decode_tokens_per_s=5.0)
    other["settings"][key] = value
    found = compare(save("a", full_result()), save("b", other))
    assert found["regressions"] == 0 and found["warnings"][0].startswith(f"different settings: {key} ")


def test_versions_and_repeats_are_told_and_still_judged(save: Saver) -> None:
    other = changed(full_result(), decode_tokens_per_s=5.0)
    other["machine"]["versions"]["onnxruntime"] = "1.32.0"
    other["machine"]["memory_bytes"] += 1 << 20  # a kernel keeps a little more for itself
    other["settings"]["repeats"] = 9
    found = compare(save("a", full_result()), save("b", other))
    assert found["warnings"] == ["other versions: onnxruntime 1.31.1 to 1.32.0"]
    assert found["regressions"] == 1


def test_a_noisy_machine_is_named(save: Saver) -> None:
    loud, quiet = full_result(), full_result()
    loud["conditions"] |= {"noisy": True, "noise_percent": 40.0}
    quiet["conditions"] |= {"noisy": False, "noise_percent": 9.0}
    assert compare(save("a", loud), save("b", quiet))["warnings"] == [
        "the machine was noisy, the same work varied before by 40 %: the intervals of speeds and times are "
        "wider by that"
    ]


def test_a_run_that_fails_now_is_a_regression(save: Saver) -> None:
    dead = full_result()
    dead["results"][1] = {"artifact": "out/gguf-int8", "error": "killed by SIGKILL"}
    good, bad = save("a", full_result()), save("b", dead)
    assert figures(compare(good, bad)) == {
        "runs": {
            **{"figure": "runs", "before": 1, "after": None, "ratio": None, "interval": None},
            **{"change_percent": None, "verdict": "regression", "error": "killed by SIGKILL"},
        }
    }
    assert figures(compare(bad, good))["runs"]["verdict"] == "improvement"
    assert figures(compare(bad, bad))["runs"]["verdict"] == "not told apart"
    assert "killed by SIGKILL" in compare_text(compare(good, bad))


def test_fidelity_is_judged_by_its_standard_errors_on_the_same_text(save: Saver) -> None:
    before, after = full_fidelity(), full_fidelity()
    after["results"][1]["mean_kl_nats"] *= 1.05  # within 2 x 4 % of either
    after["results"][2]["mean_kl_nats"] *= 1.5
    after["results"][3]["mean_kl_nats"] *= 0.5
    found = compare(save("a", before), save("b", after))
    verdicts = [figures(found, n)["mean_kl_nats"]["verdict"] for n in (1, 2, 3)]
    assert verdicts == ["not told apart", "regression", "improvement"]
    after["text"]["tokens"] = 512
    found = compare(save("a", before), save("b", after))
    assert (
        found["regressions"] == 0 and "different texts: a <text> (8,192 tokens) and" in found["warnings"][0]
    )
    after["text"]["tokens"] = 8192
    after["results"][2]["positions"] = 99
    assert compare(save("a", before), save("b", after))["regressions"] == 0


def answered(right: list[bool], **more: Any) -> dict[str, Any]:
    answers = [{"question": str(n), "expected": str(n), "right": r} for n, r in enumerate(right)]
    share = 100 * sum(right) / len(right)
    row = {
        "artifact": "a",
        "n": len(right),
        "correct": sum(right),
        "accuracy_percent": share,
        "answers": answers,
    }
    return {"task": "gsm8k", "results": [row | {"ci95_percent": [max(0.0, share - 10), share + 9]} | more]}


def test_answers_to_the_same_questions_are_paired(save: Saver) -> None:
    before = answered([True] * 60 + [False] * 40)
    found = compare(save("a", before), save("b", answered([True] * 52 + [False] * 48)))
    figure = figures(found, 0)["gsm8k: accuracy_percent"]
    # Eight lost and none won: two-sided exact McNemar, 2 / 2^8.
    assert figure["paired_p"] == pytest.approx(2 / 2**8)
    assert figure["verdict"] == "regression" and figure["difference_percent"] == pytest.approx(-8)
    found = compare(save("a", before), save("c", answered([True] * 58 + [False] * 42)))
    assert figures(found, 0)["gsm8k: accuracy_percent"]["verdict"] == "not told apart"


def test_answers_to_other_questions_go_by_their_intervals(save: Saver) -> None:
    before = answered([True] * 60 + [False] * 40)
    after = answered([True] * 52 + [False] * 48)
    for answer in after["results"][0]["answers"]:
        answer["question"] += "'"
    figure = figures(compare(save("a", before), save("b", after)), 0)["gsm8k: accuracy_percent"]
    assert figure["paired_p"] is None and figure["verdict"] == "not told apart"
    # Newcombe: 52 - 60 -+ the roots of 10^2 + 9^2, and 9^2 + 10^2.
    assert figure["difference_interval_percent"] == pytest.approx([-8 - 181**0.5, -8 + 181**0.5])
    after = answered([True] * 20 + [False] * 80, answers=[])
    figure = figures(compare(save("a", before), save("b", after)), 0)["gsm8k: accuracy_percent"]
    assert figure["verdict"] == "regression"


def test_reports_compare_with_all_that_they_hold(tmp_path: Path, save: Saver) -> None:
    folders = []
    for name, factor in (("a", 1.0), ("b", 0.5)):
        bench = changed(full_result(), 3, decode_tokens_per_s=32.5 * factor)
        report = make_report(
            bench,
            checkpoint="fox",
            fidelity=full_fidelity(),
            evaluations=[full_evaluation()],
            profiles=PROFILES,
        )
        folders.append(write_report(report, tmp_path / name)[0])
    found = compare(*folders)
    assert found["regressions"] == 1
    assert figures(found, 3)["gsm8k: accuracy_percent"]["paired_p"] == 1
    # A report and the bench in it have the bench's figures in common.
    assert compare(folders[0], save("bench", full_result()))["regressions"] == 0


def test_artifacts_are_matched_by_name_then_by_the_path_s_end_then_if_alone(save: Saver) -> None:
    moved = full_result(3)
    moved["results"][1]["artifact"] = "elsewhere/gguf-int8"
    moved["results"][2]["artifact"] = "elsewhere/new"
    found = compare(save("a", full_result(3)), save("b", moved))
    assert [r["before_artifact"] for r in found["results"]] == ["torch:fox", "out/gguf-int8"]
    assert (found["only_before"], found["only_after"]) == (["out/gguf-laptop"], ["elsewhere/new"])
    assert "only after: elsewhere/new" in compare_text(found)
    one, other = full_result(1), full_result(1)
    other["results"][0]["artifact"] = "quite/another"
    found = compare(save("a", one), save("b", other))
    assert found["warnings"] == ["different artifacts: torch:fox and quite/another"]
    both = full_result(2)
    both["results"][1]["artifact"] = "x"
    both["results"][0]["artifact"] = "y"
    with pytest.raises(FoxEdgeError, match=r"no artifact is in both: .*a\.json has torch:fox; .* has y, x"):
        compare(save("a", one), save("b", both))


def test_rows_of_several_users_are_not_mixed(save: Saver) -> None:
    two = full_result(2)
    two["results"].append({**two["results"][1], "users": 4, "decode_tokens_per_s": 9.0})
    found = compare(save("a", two), save("b", two))
    assert found["regressions"] == 0 and len(found["results"]) == 3


def test_the_verb_ends_with_2_only_for_a_regression(save: Saver, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = save("a", full_result()), save("b", changed(full_result(), decode_tokens_per_s=11.0))
    assert main(["compare", str(good), str(bad)]) == 2
    said = capsys.readouterr().out
    assert "REGRESSION" in said and "1 regression, 0 improvements" in said
    assert main(["compare", str(bad), str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["improvements"] == 1
    assert main(["compare", str(good), str(bad), "--tolerance", "60"]) == 0
    assert main(["compare", str(good), "nowhere.json"]) == 2
    assert "nowhere.json: cannot be read" in capsys.readouterr().err
