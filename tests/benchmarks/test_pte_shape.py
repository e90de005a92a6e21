"""The goals of ExecuTorch at Fox-1's shape: which rows are held against which, and what the peer is given."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.pte_shape import _FIGURES, GOALS, PEER, best_of, reached


def row(artifact: str, run: str, value: float) -> dict[str, Any]:
    return {"artifact": artifact, "run": run, **dict.fromkeys(_FIGURES, value)}


def test_the_peer_is_given_the_better_of_its_settings() -> None:
    fast = {"load_s": 2.0, "prompt_tokens_per_s": 100.0, "decode_tokens_per_s": 20.0}
    slow = {"load_s": 1.0, "prompt_tokens_per_s": 90.0, "decode_tokens_per_s": 30.0}
    memory = {"running_rss_bytes": 5, "peak_rss_bytes": 7}
    best = best_of([fast | memory, slow | {"running_rss_bytes": 4, "peak_rss_bytes": 8}])
    assert best == {
        "load_s": 1.0,
        "prompt_tokens_per_s": 100.0,
        "decode_tokens_per_s": 30.0,
        "running_rss_bytes": 4,
        "peak_rss_bytes": 7,
    }


def test_ours_and_the_peers_rows_are_told_apart() -> None:
    names = dict.fromkeys(goal.ours for goal in GOALS if goal.section == "runs")
    peers = dict.fromkeys(goal.peers for goal in GOALS if goal.section == "runs")
    rounds = [
        [*(row("pte-int4", name, 30 * n) for name in names), *(row(PEER, name, 10 * n) for name in peers)]
        for n in (1, 2, 4)
    ]
    for goal in reached("runs", rounds):
        assert (goal["ours"], goal["peer"], goal["ratio"]) == (60, 20, 3)


def test_exports_are_held_against_limits_of_their_own() -> None:
    rows = [
        {"artifact": "pte-int4", "seconds": 70.0, "peak_rss_bytes": 7e9},
        {"artifact": PEER, "seconds": 40.0, "peak_rss_bytes": 1e9},
    ]
    found = {goal["what"]: goal["reached"] for goal in reached("exports", [rows])}
    assert found == {"export, wall": True, "export, peak RSS": False}


@pytest.mark.parametrize("section", ["exports", "runs", "fidelity"])
def test_every_section_has_goals_of_different_names(section: str) -> None:
    names = [goal.what for goal in GOALS if goal.section == section]
    assert names and len(set(names)) == len(names)
