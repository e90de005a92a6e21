"""The goals at Fox-1's shape: ours beside the peer's, round by round."""

from __future__ import annotations

import pytest

from benchmarks.onnx_shape import GOALS, Goal, reached


def row(who: str, run: str, **figures: float) -> dict:
    others = {goal.figure: 1.0 for goal in GOALS}
    name = {"artifact": run} if "onnx" in run or "peer" in run else {"run": run, "artifact": "folder"}
    return {"who": who, **name, **others, **figures}


def test_medians_are_of_the_rounds_own_ratios() -> None:
    rounds = [
        [
            row("fox-edge", "prompt of 234", prompt_tokens_per_s=ours),
            row("onnxruntime-genai", "prompt of 234", prompt_tokens_per_s=peers),
        ]
        for ours, peers in ((300, 100), (250, 50), (90, 45))
    ]
    found = reached(rounds)[0]
    assert found["ratio"] == 3 and (found["ours"], found["peer"]) == (250, 50)
    assert found["what"] == "prompt of 234, tok/s" and found["section"] == "runs" and found["reached"]


def test_exports_are_measured_once() -> None:
    exports = [
        row("fox-edge", "onnx-int4-nearest", seconds=31, peak_rss_bytes=1),
        row("onnxruntime-genai", "peer-genai", seconds=60, peak_rss_bytes=10),
    ]
    found = reached([exports])[0]
    assert found["ratio"] == pytest.approx(31 / 60) and not found["reached"]


@pytest.mark.parametrize(
    ("bounds", "ours", "good"),
    [
        ({"at_most": 0.5}, 5, True),
        ({"at_most": 0.5}, 6, False),
        ({"at_least": 0.5}, 5, True),
        ({"at_least": 0.5}, 4, False),
        ({"limit": 7}, 7, True),
        ({"limit": 7}, 8, False),
        ({}, 1000, True),
    ],
)
def test_what_counts_as_reached(bounds: dict[str, float], ours: float, good: bool) -> None:
    assert Goal("x", "runs", "load_s", "a", "b", **bounds).row([(ours, 10)])["reached"] == good


def test_every_goal_has_its_own_name() -> None:
    assert len({goal.what for goal in GOALS}) == len(GOALS)
