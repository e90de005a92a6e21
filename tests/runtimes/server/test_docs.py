"""What docs/serve.md tells a reader to type works, and its limits are those of the code."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

from fox_edge.artifact import Artifact
from runtimes.server import guard, requests
from runtimes.server.grammar import MAX_GRAMMAR_CHARS
from runtimes.server.server import ServeOptions
from runtimes.server.slots import CHUNK
from tests.runtimes.server.conftest import running

TEXT = (Path(__file__).parents[3] / "docs" / "serve.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_requests_are_answered(artifact: Artifact) -> None:
    with running(str(artifact.path), name="fox-laptop", slots=1) as served:
        curl = next(block for block in blocks("sh") if "curl" in block)
        body = json.loads(re.search(r"-d '(.*)'", curl, re.DOTALL)[1])  # type: ignore[index]
        path = re.search(r"127.0.0.1:8080(\S+)", curl)[1]  # type: ignore[index]
        assert served.send("POST", path, body)[0] == 200
        printed = io.StringIO()
        code = "\n".join(blocks("python")).replace("http://127.0.0.1:8080", served.url)
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert "completion_tokens" in printed.getvalue()
        assert served.service.engine.metrics.requests["/v1/chat/completions", 200] == 3
        routes = re.findall(r"^\| `(/[\w/]*)`", TEXT, re.MULTILINE)
        assert len(routes) == 6
        for route in routes:
            assert served.send("GET", route)[0] in (200, 405), route


def test_the_options_are_those_of_the_command() -> None:
    help = subprocess.run(
        [sys.executable, "-m", "fox_edge.cli", "serve", "--help"], capture_output=True, text=True, timeout=60
    ).stdout
    ours = TEXT.replace("python -m benchmarks.serve ARTIFACT --clients 32 --seconds 120 --results FILE", "")
    named = set(re.findall(r"--[a-z][a-z-]+", ours)) - {"--peer"}
    assert len(named) > 6 and all(flag in help for flag in named)


def test_the_limits_are_those_of_the_code() -> None:
    options = ServeOptions()
    assert f"`--slots` ({options.slots})" in TEXT and f"`--queue` ({options.queue})" in TEXT
    assert f"`--grace` seconds ({options.grace_s:g})" in TEXT and "`--timeout` (600 s" in TEXT
    assert f"{CHUNK} tokens are run per round" in TEXT and f"in steps of {CHUNK} tokens" in TEXT
    assert guard.MAX_BODY_BYTES == 8 << 20 and guard.BODY_TIMEOUT_S == 30
    assert MAX_GRAMMAR_CHARS == 64 << 10 and requests.MAX_STOPS == 4
