"""Starting, asking and ending a browser: with stand-ins that behave badly, and with a real one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fox_edge.errors import FoxEdgeError
from runtimes.browser import chromium
from runtimes.browser.chromium import PROGRAM_VARIABLE, Chromium, descendants, find_chromium
from tests.clients.helpers import need_chromium

# Answers what it is told with an error; then it says nothing more, and ends when its pipe closes.
REFUSING = """
import json, os
held = b""
while part := os.read(3, 1 << 16):
    held += part
    *messages, held = held.split(b"\\0")
    for message in messages:
        id = json.loads(message)["id"]
        os.write(4, json.dumps({"id": id, "error": {"message": "not today"}}).encode() + b"\\0")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a program that is taken for the browser."""

    def make(text: str) -> None:
        program = tmp_path / "browser"
        program.write_text(text)
        program.chmod(0o755)
        monkeypatch.setenv(PROGRAM_VARIABLE, str(program))

    return make


def test_a_browser_that_is_not_there_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(PROGRAM_VARIABLE, raising=False)
    with pytest.raises(FoxEdgeError, match=r"no Chromium .* found \(chromium, .*FOX_EDGE_CHROMIUM"):
        find_chromium()
    monkeypatch.setenv(PROGRAM_VARIABLE, "/nowhere/browser")
    with pytest.raises(FoxEdgeError, match="/nowhere/browser"):
        Chromium()


def test_a_browser_that_ends_says_why(stand_in: Callable[[str], None]) -> None:
    stand_in("#!/bin/sh\necho this machine has no libraries >&2\nexit 3\n")
    with pytest.raises(FoxEdgeError, match="the browser ended with status 3: this machine has no libraries"):
        Chromium()


def test_a_browser_that_refuses_is_quoted(stand_in: Callable[[str], None]) -> None:
    stand_in(f"#!{sys.executable}\n{REFUSING}")
    with pytest.raises(FoxEdgeError, match=r"the browser refused Target\.createTarget: not today"):
        Chromium()


def test_a_browser_that_says_nothing_is_not_waited_for(
    stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chromium, "START_S", 0.3)
    stand_in("#!/bin/sh\nexec sleep 60 3<&- 4>&1\n")
    monkeypatch.setattr(chromium, "END_S", 0.2)
    before = time.monotonic()
    with pytest.raises(FoxEdgeError, match=r"did not answer in time \(Target.createTarget\)"):
        Chromium()
    assert time.monotonic() - before < 30


def test_what_a_page_says(tmp_path: Path) -> None:
    need_chromium()
    page = tmp_path / "page.html"
    page.write_text(
        "<script>window.answer = new Promise((done) => setTimeout(done, 20, {a: [1.5, 'ü']}))</script>"
    )
    browser = Chromium()
    try:
        browser.open(page.as_uri())
        assert browser.evaluate("answer") == {"a": [1.5, "ü"]}
        assert browser.evaluate("'x'.repeat(300_000)") == "x" * 300_000
        with pytest.raises(FoxEdgeError, match=r"^the crates are empty$"):
            browser.evaluate("Promise.reject(new Error('the crates are empty'))")
        with pytest.raises(FoxEdgeError, match=r"did not answer in time \(Runtime.evaluate\)"):
            browser.evaluate("new Promise(() => {})", timeout_s=0.2)
        assert browser.evaluate("1 + 1") == 2
        with pytest.raises(FoxEdgeError, match="ERR_FILE_NOT_FOUND"):
            browser.open((tmp_path / "other.html").as_uri())
        family = descendants(browser.pid)
        assert len(family) > 2 and family[0] == browser.pid
    finally:
        browser.close()
    assert not alive(family)


def test_no_browser_is_left_behind_by_a_process_that_is_killed(tmp_path: Path) -> None:
    need_chromium()
    lines = (
        "from runtimes.browser.chromium import Chromium; b = Chromium(); print(b.pid, flush=True); input()"
    )
    root = Path(__file__).parents[3]
    far_down = tmp_path / "a-folder-with-a-long-name" / "for-files-that-are-needed-for-a-while"
    far_down.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", lines],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "TMPDIR": str(far_down)},
    )
    with process:
        assert process.stdout is not None
        family = descendants(int(process.stdout.readline()))
        assert len(family) > 2
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(family)
    shutil.rmtree(tmp_path)


def alive(pids: list[int]) -> list[int]:
    """Those that still run; who only waits to be buried does not."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return [pid for pid in pids if runs(pid)]
