"""A missing program skips a test on a user's machine, and fails it where .ci/run says that it is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import helpers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    yield


@pytest.mark.usefixtures("nothing_installed")
def test_what_is_missing_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "REQUIRED", [])
    with pytest.raises(pytest.skip.Exception, match="node is not installed"):
        helpers.need_node(helpers.HERE)
    with pytest.raises(pytest.skip.Exception, match=r"none of chromium, .* is installed"):
        helpers.need_chromium()


@pytest.mark.usefixtures("nothing_installed")
def test_what_is_required_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "REQUIRED", ["node", "chromium"])
    with pytest.raises(pytest.fail.Exception, match="node is required here"):
        helpers.need_node(helpers.HERE)
    with pytest.raises(pytest.fail.Exception, match="chromium is required here"):
        helpers.need_chromium()


def test_ci_requires_what_the_tests_ask_for() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"required\+=\((\w+)\)", script) == ["node", "chromium"]
    assert "export FOX_EDGE_REQUIRE=" in script and script.index("FOX_EDGE_REQUIRE=") < script.index(
        "make test"
    )
