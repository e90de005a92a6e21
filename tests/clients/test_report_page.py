"""The report in Chromium: wide and narrow, light, dark and on paper; asking nobody, saying nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.document import make_report, write_report
from tests.benchmarks.sample_report import PROFILES, full_evaluation, full_fidelity, full_result
from tests.clients.helpers import HERE, need_chromium, need_node, run_node

VIEWS = {
    "desktop": ("1280", "900", "light", "screen"),
    "phone": ("390", "800", "dark", "screen"),
    "narrow": ("320", "640", "light", "screen"),
    "paper": ("760", "1000", "dark", "print"),
}
GROUNDS = {
    "desktop": "rgb(251, 250, 248)",
    "phone": "rgb(23, 22, 20)",
    "narrow": "rgb(251, 250, 248)",
    "paper": "rgb(255, 255, 255)",  # paper stays white, whatever the screen likes
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page with everything in it, and one whose every name is long, unbroken and hostile."""
    folder = tmp_path_factory.mktemp("reports")
    bench = full_result(12)
    bench["results"].append(
        {"artifact": "x", "format": "onnx", "users": 1, "error": "killed: " + "sum " * 60}
    )
    parts: dict[str, Any] = {"fidelity": full_fidelity(12), "evaluations": [full_evaluation(12)]}
    full = make_report(bench, checkpoint="tensoropera/Fox-1-1.6B", profiles=PROFILES, **parts)
    bad = "<script>alert(1)</script><img src=http://example.com/x onerror=alert(2)>" + "x" * 200
    spoiled = make_report(bench, checkpoint=bad, profiles=PROFILES, **parts)
    for row in spoiled["rows"]:
        row["name"] = bad
        row["answer"] = bad
    for place in (spoiled["machine"], *spoiled["profiles"], *spoiled["advice"]):
        place |= {key: bad for key, value in place.items() if isinstance(value, str)}
    spoiled |= {"question": bad, "commands": [bad], "tasks": [{"task": bad, "description": bad, "n": 3}]}
    for name, report in (("full", full), ("spoiled", spoiled)):
        write_report(report, folder / name)
    return {name: folder / name / "report.html" for name in ("full", "spoiled")}


def look(page: Path, view: str) -> dict[str, Any]:
    return run_node(need_node(HERE), "report_page.mjs", need_chromium(), page, *VIEWS[view])


@pytest.mark.parametrize("view", VIEWS)
def test_the_page(pages: dict[str, Path], view: str) -> None:
    seen = look(pages["full"], view)
    assert seen["title"] == "fox-edge: tensoropera/Fox-1-1.6B, exported and measured"
    assert seen["complaints"] == [] and seen["requests"] == [seen["url"]]
    assert seen["sideways"] <= 0
    assert seen["ground"] == GROUNDS[view]
    assert seen["cards"] == ["gguf-phone", "gguf-phone", "gguf-tiny", "gguf-phone"]
    assert seen["drawings"] == 9 and seen["cutTexts"] == []
    # Projections and the published row: 12 artifacts on 3 devices, and one.
    assert len(seen["hatched"]) == 37 and set(seen["hatched"]) == {'url("#hatch")'}
    assert all(region["focusable"] for region in seen["regions"])
    # On a narrow screen the wide table scrolls in itself.
    assert seen["regions"][0]["scrolls"] == (view in ("phone", "narrow"))
    if view == "phone":
        assert seen["smallest"] >= 10  # lines of the drawings' smallest text, pixels


@pytest.mark.parametrize("view", ["desktop", "phone"])
def test_hostile_names_run_nothing_ask_nothing_and_stay_inside(pages: dict[str, Path], view: str) -> None:
    seen = look(pages["spoiled"], view)
    assert seen["complaints"] == [] and seen["requests"] == [seen["url"]]
    assert seen["sideways"] <= 0
    assert seen["cutTexts"] == []
