"""Figures and verdicts from made-up results, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu.goals import GOALS, goal_rows, goals_text
from benchmarks.readme_runs import gpu_table

FLOORS = {
    "bandwidth": [{"bytes_per_s": 4.0e12}, {"bytes_per_s": 4.2e12}],
    "compute": [
        {"type": "bf16", "operations_per_s": 8e14},
        {"type": "float32", "operations_per_s": 5e13},
    ],
}


def speed(rate: float, **more: float) -> dict[str, Any]:
    return {"decode_tokens_per_s": rate, "total_tokens_per_s": rate, "bytes_per_token": 3.36e9, **more}


def results() -> dict[str, Any]:
    """Everything measured, and all of it good but the int4 rate and the prompt."""
    return {
        "parts": {
            "floors": {"card": FLOORS},
            "exact": {
                "logits, nano": {"relative_error": 4e-3},
                "logits, random": {"relative_error": 6e-3},
                "greedy, nano": {"equal": 6, "prompts": 6},
            },
            "kernels": {"head": {"relative_error": 2e-3}, "attend": {"relative_error": 3e-3}},
            "decode": {
                "bf16": speed(1000.0),
                "int8": speed(1700.0),
                "int4": speed(2300.0),
                "bf16, the paper's prompts": speed(990.0, peak_device_bytes=3_550_000_000),
            },
            "prompt": {
                "bf16": speed(900.0, prompt_tokens_per_s=1e5, prompt_operations_per_token=3.2e9),
            },
            "users": {"bf16, 32 users": speed(410.0) | {"total_tokens_per_s": 13_000.0}},
            "peer": {"generate": {"decode_tokens_per_s": 40.0}},
        }
    }


def by_name(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in found}


def test_every_figure_by_hand() -> None:
    rows = by_name(goal_rows(results()))
    share = rows["BF16, one user, decode: share of the bandwidth"]
    assert share["ours"] == pytest.approx(100 * 1000 * 3.36e9 / 4.2e12)  # 80 %
    assert (share["verdict"], share["note"]) == ("reached", "1,000 tok/s")
    assert rows["int8, one user, over our BF16"]["ours"] == 1.7
    int4 = rows["int4, one user, over our BF16"]
    assert (int4["ours"], int4["verdict"]) == (2.3, "missed")
    assert rows["BF16, 32 users, each"]["ours"] == 410
    assert rows["BF16, 32 users, all together"]["verdict"] == "reached"
    assert rows["memory, BF16, the paper's prompts, one user"]["ours"] == 3550
    prompt = rows["prompt of 4,000: share of the BF16 matrix rate"]
    assert prompt["ours"] == pytest.approx(40) and prompt["verdict"] == "missed"
    assert rows["one user, over Hugging Face's generate"]["ours"] == 25
    assert rows["BF16 logits against float32 on the CPU, relative error"]["ours"] == 6e-3
    assert rows["every kernel against unpacked weights, relative error"]["ours"] == 3e-3
    assert rows["greedy text of nano as on the CPU, 64 tokens"]["ours"] == 100


def test_more_than_allowed_is_missed() -> None:
    found = results()
    found["parts"]["decode"]["bf16, the paper's prompts"]["peak_device_bytes"] = 3_600_000_001
    found["parts"]["exact"]["greedy, nano"]["equal"] = 5
    rows = by_name(goal_rows(found))
    assert rows["memory, BF16, the paper's prompts, one user"]["verdict"] == "missed"
    assert rows["greedy text of nano as on the CPU, 64 tokens"]["verdict"] == "missed"


def test_what_was_not_measured_says_so_and_why() -> None:
    rows = goal_rows({})
    assert {row["verdict"] for row in rows} == {"not measured"} and len(rows) == len(GOALS)
    found = results()
    found["parts"]["decode"]["int8"] = {"error": "ended after 90 s"}
    del found["parts"]["floors"]
    named = by_name(goal_rows(found))
    assert named["int8, one user, over our BF16"]["verdict"] == "not measured"
    assert named["BF16, one user, decode: share of the bandwidth"]["verdict"] == "not measured"
    assert named["int4, one user, over our BF16"]["verdict"] == "missed"
    text = goals_text(goal_rows(found))
    assert "int8, one user, over our BF16: ended after 90 s" in text
    assert "reached" in text and "over 200 tok/s" in text and "at least 2.4 x" in text


def test_the_page_s_table_has_every_verdict_and_every_rate_with_its_share() -> None:
    found = results()
    for part in ("decode", "prompt", "users"):
        for row in found["parts"][part].values():
            given = {
                "prompt_tokens_per_s": 1e5,
                "prompt_operations_per_token": 4e9,
                "peak_device_bytes": 3.5e9,
            }
            row |= {key: value for key, value in given.items() if key not in row}
    del found["parts"]["kernels"]
    found["parts"]["users"]["bf16, 64 users"] = {"error": "ended after 120 s"}
    found["parts"]["floors"]["card"] = FLOORS | {"torch": {"cuda": "13.0", "triton": "3.6.0"}}
    found |= {
        "goals": goal_rows(found),
        "card": {"name": "NVIDIA H200", "driver": "580.1"},
        "machine": {"cpu": "x", "cores": 16, "memory_bytes": 2**37, "python": "3.12", "versions": {"a": "1"}},
    }
    lines = gpu_table(found).splitlines()
    assert lines[0].startswith("| Fox-1's shape on one NVIDIA H200 | paper, H100 | to reach | ours |")
    assert "| int4, one user, over our BF16 |  | at least 2.4 x | 2.3 x (2,300 tok/s) | **missed** |" in lines
    assert (
        "| every kernel against unpacked weights, relative error |  | at most 0.01 | – | **not measured** |"
        in lines
    )
    assert "| decode: bf16 | 1,000 | 1,000 | 80 % | 100,000 | 50 % | 3,500 |" in lines
    assert not any("64 users" in line for line in lines)
    assert lines[-1].startswith("NVIDIA H200, driver 580.1, CUDA 13.0, triton 3.6.0; x, 16 cores, 128 GiB;")


def test_a_figure_that_is_no_number_is_no_success() -> None:
    found = results()
    found["parts"]["kernels"]["head"]["relative_error"] = float("inf")
    assert by_name(goal_rows(found))["every kernel against unpacked weights, relative error"]["verdict"] == (
        "missed"
    )
