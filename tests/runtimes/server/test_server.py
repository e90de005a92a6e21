"""The command itself, in a process of its own: ports, keys, how it begins and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fox_edge.artifact import Artifact
from fox_edge.errors import FoxEdgeError
from runtimes.server.server import is_loopback

ENDLESS = {
    "model": "nano-int8",
    "messages": [{"role": "user", "content": "Hi"}],
    "grammar": "start: /a{900,}/",
    "stream": True,
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fox_edge.cli", "serve", *arguments, "--threads", "1"]


def refused(*arguments: str, **environment: str) -> str:
    """What a start that fails says: one sentence, exit status 2."""
    clean = {name: value for name, value in os.environ.items() if name != "FOX_EDGE_API_KEY"}
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60, env={**clean, **environment}
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("note: "))
    return line


@contextlib.contextmanager
def started(
    artifact: Artifact | str, *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The running command, and what it said when it was ready."""
    spec = artifact if isinstance(artifact, str) else str(artifact.path)
    line = command(spec, "--port", "0", "--json", *arguments)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def begin(port: int, body: dict[str, Any]) -> http.client.HTTPResponse:
    """A stream that has begun."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200 and response.readline().startswith(b"data: ")
    return response


def test_a_port_in_use_is_one_sentence(artifact: Artifact) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refused(str(artifact.path), "--port", port)
    assert said.startswith(f"fox-edge serve: cannot listen on 127.0.0.1, port {port}: ")
    assert "in use" in said and "another --port" in said


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["--host", "0.0.0.0"], {}, "reached from other machines, so an API key is needed"),
        (["--host", "0.0.0.0", "--api-key", " "], {}, "the API key is empty"),
        (["--host", "0.0.0.0"], {"FOX_EDGE_API_KEY": ""}, "the API key is empty"),
        (["--host", "no.such.name.invalid"], {}, "--host no.such.name.invalid: "),
        (["--port", "99999"], {}, "--port 99999 is not a port from 0 to 65535"),
        (["--context", "5000"], {}, "the model has 1 to 1024"),
        (["--slots", "0"], {}, "0 is not a whole number from 1"),
        (["--queue", "-1"], {}, "-1 is not a whole number from 0"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    artifact: Artifact, arguments: list[str], environment: dict[str, str], sentence: str
) -> None:
    assert sentence in refused(str(artifact.path), "--port", "0", *arguments, **environment)


def test_no_such_model() -> None:
    assert "no such artifact" in refused("nowhere")


def test_the_key_comes_from_the_environment_too(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOX_EDGE_API_KEY", "from outside")
    with started(artifact, "--host", "0.0.0.0", "--slots", "1") as (_, ready):
        assert ready["api_key"] is True
        connection = http.client.HTTPConnection("127.0.0.1", ready["port"], timeout=20)
        for key, status in (("no", 401), ("from outside", 200)):
            # Where other machines ask, they may do so under any name.
            headers = {"Authorization": f"Bearer {key}", "Host": "fox.example"}
            connection.request("GET", "/v1/models", headers=headers)
            response = connection.getresponse()
            response.read()
            assert response.status == status


def test_ready_tells_all_and_a_signal_ends_it_well(artifact: Artifact) -> None:
    with started(artifact, "--slots", "3", "--context", "256", "--name", "fox") as (process, ready):
        assert ready["url"] == f"http://127.0.0.1:{ready['port']}" and ready["pid"] == process.pid
        assert (ready["model"], ready["slots"], ready["context"]) == ("fox", 3, 256)
        assert ready["rss_bytes"] > 1e7 and ready["api_key"] is False
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 0 and "Traceback" not in said


def test_without_json_it_is_one_line(artifact: Artifact) -> None:
    process = subprocess.Popen(
        command(str(artifact.path), "--port", "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:") and "4 x 1024 tokens of context" in line
        assert "as 'nano-int8'" in line and "MB of memory" in line
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=20)
        assert (process.returncode, rest) == (0, "")
    finally:
        process.kill()
        process.communicate()


def test_answers_in_flight_are_finished(artifact: Artifact) -> None:
    with started(artifact, "--slots", "1") as (process, ready):
        body = {**ENDLESS, "max_tokens": 900}
        with contextlib.closing(begin(ready["port"], body)) as response:
            process.send_signal(signal.SIGTERM)
            rest = response.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        last = json.loads(rest.split(b"\n\n")[-3].removeprefix(b"data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        process.communicate(timeout=20)
        assert process.returncode == 0


def test_after_the_grace_time_they_are_told() -> None:
    # In PyTorch, where a thousand tokens of the embedded model take seconds.
    with started("torch:nano", "--slots", "1", "--grace", "0") as (process, ready):
        with contextlib.closing(begin(ready["port"], {**ENDLESS, "model": "nano"})) as response:
            process.send_signal(signal.SIGTERM)
            rest = response.read()
        last = json.loads(rest.strip().split(b"\n\n")[-1].removeprefix(b"data: "))
        assert last["error"]["code"] == "shutting_down"
        process.communicate(timeout=20)
        assert process.returncode == 0


def test_a_killed_server_leaves_the_port_to_the_next(artifact: Artifact) -> None:
    with started(artifact, "--slots", "1") as (process, ready):
        with contextlib.closing(begin(ready["port"], ENDLESS)):
            process.kill()
            process.wait()
        time.sleep(0.05)
        line = command(str(artifact.path), "--port", str(ready["port"]), "--json", "--slots", "1")
        again = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert again.stdout is not None
            assert json.loads(again.stdout.readline())["port"] == ready["port"]
        finally:
            again.kill()
            again.communicate()


def test_what_is_loopback() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("127.3.2.1")
    assert is_loopback("::1") and not is_loopback("0.0.0.0") and not is_loopback("::")
    with pytest.raises(FoxEdgeError, match="--host"):
        is_loopback("no.such.name.invalid")
