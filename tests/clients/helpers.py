"""What the tests of foreign clients share: the question asked, and programs that may be missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# What .ci/run found or installed, and which tests may therefore not be skipped: 'node', 'chromium'.
REQUIRED = os.environ.get("FOX_EDGE_REQUIRE", "").split()


@dataclass(frozen=True)
class Asked:
    """An exported folder, a question put to it as a chat, and our own runtime's greedy answer."""

    folder: Path
    question: str
    prompt: list[int]
    answer: list[int]
    text: str


def need(what: str, there: object, remedy: str) -> None:
    """Skip the test when something is missing; where it is required, fail instead."""
    if there:
        return
    if what in REQUIRED:
        pytest.fail(f"{what} is required here, but {remedy}")
    pytest.skip(remedy)


def need_node(packages: Path) -> str:
    """The `node` program, with the packages of that folder installed."""
    node = shutil.which("node")
    need("node", node, "node is not installed")
    need("node", (packages / "node_modules").is_dir(), "`make clients` was not run")
    assert node is not None
    return node


def need_chromium() -> str:
    """The Chromium (or Chrome) program."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    need("chromium", found, f"none of {', '.join(names)} is installed")
    assert found is not None
    return found


def run_node(node: str, script: str, *arguments: str | Path) -> dict[str, Any]:
    """What a script of this folder prints: one JSON object. Its complaints are the test's failure."""
    done = subprocess.run(
        [node, HERE / script, *arguments], capture_output=True, text=True, timeout=120, cwd=HERE
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
