"""Every request that is refused, with its status and its sentence; the routes beside the answers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from fox_edge.artifact import Artifact
from runtimes.server import guard
from tests.runtimes.server.conftest import Served, running, slow_down

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def error_of(answer: tuple[int, dict[str, str], Any]) -> tuple[int, str, str | None, str | None]:
    """Status, sentence, param and code of an error in OpenAI's shape."""
    status, _, body = answer
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert "\n" not in message and len(message) <= 400
    return status, message, body["error"]["param"], body["error"]["code"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{not json", "the body is not JSON"),
        (b"", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[]", "the body must be|but: "),
        (b'{"model": "\\ud800", "messages": []}', "the body is not JSON"),
        (b'{"messages": []}', "model is missing"),
    ],
)
def test_what_is_no_request(served: Served, body: bytes, sentence: str) -> None:
    status, message, _, _ = error_of(served.send("POST", "/v1/chat/completions", body))
    assert status == 400
    assert any(part in message for part in sentence.split("|")), message


@pytest.mark.parametrize(
    ("fields", "sentence", "param"),
    [
        ({"max_tokens": -1}, "max_tokens is -1, but must be from 1", "max_tokens"),
        ({"max_tokens": 0}, "max_tokens is 0", "max_tokens"),
        ({"max_completion_tokens": 10**12}, "max_tokens is 1000000000000, but at most 200", "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens is a whole number, but", "max_tokens"),
        ({"seed": 10**4000}, "the body is not JSON|seed is a whole number", "seed"),
        ({"max_tokens": "many"}, "max_tokens is text", "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens is a number", "max_tokens"),
        ({"temperature": -1}, "temperature is -1", "temperature"),
        ({"temperature": True}, "temperature is true or false", "temperature"),
        ({"top_p": 0}, "top_p is 0", "top_p"),
        ({"top_k": -3}, "top_k is -3", "top_k"),
        ({"min_p": 2}, "min_p is 2", "min_p"),
        ({"repeat_penalty": 0}, "repeat_penalty is 0", "repeat_penalty"),
        ({"seed": "x"}, "seed is text", "seed"),
        ({"n": 2}, "n is not supported", "n"),
        ({"presence_penalty": 1}, "presence_penalty is not supported", "presence_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias is not supported", "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools is not supported", "tools"),
        ({"stop": ["a"] * 5}, "stop has 5 texts, but at most 4", "stop"),
        ({"stop": [""]}, "1 to 256 characters", "stop"),
        ({"stop": 7}, "stop must be text or a list of texts", "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21", "top_logprobs"),
        ({"top_logprobs": 2}, "needs logprobs", "top_logprobs"),
        ({"stream": "yes"}, "stream is text", "stream"),
        ({"response_format": {"type": "xml"}}, '"xml"; known: text', "response_format"),
        ({"response_format": {"type": "json_schema"}}, "must be an object", "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "fox"}}}},
            "followed",
            "response_format",
        ),
        ({"grammar": "root ::= ("}, "the grammar cannot be", "grammar"),
        ({"grammar": "root ::= root root"}, "the grammar cannot be followed", "grammar"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "file:///x"}}}},
            "the grammar cannot be followed",
            "response_format",
        ),
        ({"grammar": "x" * 70_000}, "has 70000 characters, but at most 65536", "grammar"),
    ],
)
def test_fields_that_cannot_be(served: Served, fields: dict[str, Any], sentence: str, param: str) -> None:
    status, message, named, _ = error_of(served.chat(**fields))
    assert status == 400 and any(part in message for part in sentence.split("|")), message
    assert named == param


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages is a list, but"),
        ("Hi", "messages is text, but"),
        ([USER, SYSTEM, USER], "messages[1] has the role system, which only the first can have"),
        ([SYSTEM], "must begin and end with a message of the user"),
        ([ASSISTANT, USER], "must begin and end with a message of the user"),
        ([USER, ASSISTANT], "must begin and end with a message of the user"),
        ([{"role": "tool", "content": "x"}], "messages[0].role is 'tool'; known: system, developer"),
        ([{"role": "user"}], "messages[0].content is missing"),
        ([{"role": "user", "content": 7}], "messages[0].content is a whole number"),
        ([{"role": "user", "content": None}], "messages[0].content is null"),
        ([{"role": "user", "content": {"a": 1}}], "messages[0].content is an object"),
        ([{"role": 1, "content": "x"}], "messages[0].role is a whole number"),
        (["Hi"], "messages[0] is text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "of type 'image_url', but only text is read",
        ),
        ([{"role": "user", "content": ["x"]}], "without a type"),
    ],
)
def test_conversations_that_cannot_be(served: Served, messages: Any, sentence: str) -> None:
    status, message, param, _ = error_of(served.chat(messages=messages))
    assert (status, param) == (400, "messages") and sentence in message, message


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (["a", "b"], "prompt has 2 entries, but one text is taken at a time"),
        ([[1, 2], [3]], "prompt has 2 entries"),
        (7, "prompt must be a text"),
        ([], "prompt must be a text"),
        ("", "the prompt is empty|"),
        ([1, 99999], "token ids 1 to 99999, but the last one is 8191"),
        ([-1], "token ids -1 to -1"),
    ],
)
def test_prompts_that_cannot_be(served: Served, prompt: Any, sentence: str) -> None:
    answer = served.send("POST", "/v1/completions", {"model": served.service.name, "prompt": prompt})
    if prompt == "" and answer[0] == 200:
        return  # a tokenizer that puts <bos> before every text makes a prompt of it
    status, message, param, _ = error_of(answer)
    assert (status, param) == (400, "prompt") and sentence in message, message


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(served: Served) -> None:
    status, message, _, code = error_of(served.chat("word " * 1500))
    assert (status, code) == (400, "context_length_exceeded")
    tokens = len(served.service.tokenizer.encode_chat([{"role": "user", "content": "word " * 1500}]))
    assert f"the prompt has {tokens} tokens, but the context holds 1024" in message
    # Megabytes are refused by their size, without being tokenized.
    start = time.monotonic()
    _, message, _, code = error_of(served.chat("word " * 1_000_000))
    assert code == "context_length_exceeded" and "the prompt has 5,000,000 bytes" in message
    assert time.monotonic() - start < 20


def test_unknown_models_and_paths(served: Served) -> None:
    status, message, param, code = error_of(
        served.send("POST", "/v1/chat/completions", {"model": "gpt-9", "messages": [USER]})
    )
    assert (status, param, code) == (404, "model", "model_not_found")
    assert message == "the model 'gpt-9' is not served here, but 'nano-int8' is"
    assert error_of(served.send("GET", "/v1/models/other"))[0] == 404
    assert error_of(served.send("GET", "/etc/passwd"))[0] == 404
    assert error_of(served.send("GET", "/docs"))[0] == 404
    assert error_of(served.send("GET", "/v1/chat/completions"))[0] == 405


def raw(served: Served, head: str, *parts: bytes) -> bytes:
    """Send bytes as they are and read until the server closes."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:  # the server has heard enough
                break
        answer = b""
        try:
            while data := connection.recv(1 << 16):
                answer += data
        except ConnectionResetError:
            pass
    return answer


HEAD = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"


def test_fifty_megabytes_are_refused_before_they_are_sent(served: Served) -> None:
    answer = raw(served, HEAD + f"Content-Length: {50 << 20}", b"{" * 1000)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer.lower()
    assert b"52,428,800 bytes, but at most 8,388,608 are read" in answer


def test_a_body_of_unknown_length_is_read_no_further_than_its_limit(served: Served) -> None:
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    answer = raw(served, HEAD + "Transfer-Encoding: chunked", *[chunk] * 50)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"at most 8,388,608 are read" in answer


def test_a_body_that_never_comes_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.2)
    answer = raw(served, HEAD + "Content-Length: 500", b"{")
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive within 0.2 s" in answer


def test_a_form_or_plain_text_is_not_taken(served: Served) -> None:
    """A page of another origin may send these without asking first."""
    kinds = {"Content-Type": "text/plain"}
    answer = served.send("POST", "/v1/chat/completions", b'{"model": "nano-int8"}', kinds)
    assert error_of(answer)[:2] == (415, "the body is 'text/plain', but application/json is due")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]"])
def test_a_name_that_is_not_this_machine_is_refused(served: Served, host: str) -> None:
    status, _, _, code = error_of(served.send("GET", "/v1/models", headers={"Host": host}))
    assert (status, code) == (403, "wrong_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8080"])
def test_names_of_this_machine_are_known(served: Served, host: str) -> None:
    assert served.send("GET", "/v1/models", headers={"Host": host})[0] == 200


def test_pages_of_other_origins_are_refused_and_get_no_permission(served: Served) -> None:
    headers = {"Origin": "https://evil.example"}
    assert error_of(served.send("GET", "/v1/models", headers=headers))[3] == "wrong_origin"
    assert served.send("GET", "/v1/models", headers={"Origin": served.url})[0] == 200
    status, found, _ = served.send("OPTIONS", "/v1/chat/completions", headers=headers)
    assert status == 403 and not any(name.startswith("access-control") for name in found)


def test_a_key_is_asked_for_everywhere_but_at_the_door(artifact: Artifact) -> None:
    with running(str(artifact.path), key="s3cret", slots=1) as served:
        assert served.send("GET", "/health")[0] == 200
        assert served.send("GET", "/")[0] == 200
        for path in ("/v1/models", "/metrics", "/nothing"):
            status, found, body = served.send("GET", path)
            assert status == 401 and found["www-authenticate"] == "Bearer"
            assert body["error"]["code"] == "invalid_api_key" and "is needed" in body["error"]["message"]
        for given in ("Bearer wrong", "Bearer s3cret2", "Bearer ", "Basic s3cret", "s3cret", "Bearer \xff"):
            answer = served.send("GET", "/v1/models", headers={"Authorization": given})
            assert error_of(answer)[0] == 401, given
        assert served.send("GET", "/v1/models", headers={"Authorization": "Bearer s3cret"})[0] == 200
        status, _, _ = served.send("POST", "/v1/chat/completions", {"model": "nano-int8", "messages": [USER]})
        assert status == 401


def test_the_model_card(served: Served, artifact: Artifact) -> None:
    status, _, body = served.send("GET", "/v1/models")
    assert status == 200 and body["object"] == "list"
    (model,) = body["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("nano-int8", "model", "fox-edge")
    card = model["fox_edge"]
    assert (card["format"], card["quant"], card["runtime"]) == ("gguf", "int8", "llama.cpp")
    assert (card["context"], card["slots"]) == (1024, 2)
    assert card["bytes"] == sum(path.stat().st_size for path in artifact.path.iterdir())
    assert card["rss_bytes"] > 10_000_000
    assert served.send("GET", "/v1/models/nano-int8")[2]["id"] == "nano-int8"


def test_health_tells_no_more_than_that(served: Served) -> None:
    assert served.send("GET", "/health")[2] == {"status": "ok"}


def test_metrics_are_prometheus_text(served: Served) -> None:
    assert served.chat(max_tokens=3)[0] == 200
    assert served.chat(max_tokens=-3)[0] == 400
    served.send("GET", "/nowhere")
    status, found, text = served.send("GET", "/metrics")
    assert status == 200 and found["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            values[name] = float(value)
    route = 'fox_edge_requests_total{path="/v1/chat/completions",status='
    assert values[route + '"200"}'] >= 1 and values[route + '"400"}'] >= 1
    assert values['fox_edge_requests_total{path="other",status="404"}'] >= 1
    assert values["fox_edge_first_token_seconds_count"] >= 1
    assert values["fox_edge_slots"] == 2 and values["fox_edge_rss_bytes"] > 1e7
    assert values['fox_edge_token_seconds_bucket{le="+Inf"}'] == values["fox_edge_token_seconds_count"]
    assert {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")} >= {
        "fox_edge_queue_depth",
        "fox_edge_decoded_tokens_total",
    }


def test_the_page_is_one_answer_that_allows_nothing_else(served: Served) -> None:
    status, found, text = served.send("GET", "/")
    assert status == 200 and found["content-type"].startswith("text/html")
    policy = found["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert "http://" not in text and "https://" not in text and "/* s" not in text
    assert found["x-content-type-options"] == "nosniff" and found["cache-control"] == "no-store"


def test_a_full_queue_says_when_to_come_back(artifact: Artifact) -> None:
    with running(str(artifact.path), slots=1, queue=0) as served:
        slow_down(served)
        body = {"model": "nano-int8", "messages": [USER], "grammar": "start: /a{900,}/", "stream": True}
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as busy:
            data = json.dumps(body).encode()
            busy.sendall(
                HEAD.replace("\n", "\r\n").encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data
            )
            assert busy.recv(1000).startswith(b"HTTP/1.1 200")
            answer = served.chat(max_tokens=2)
            status, message, _, code = error_of(answer)
            assert (status, code, answer[1]["retry-after"]) == (429, "queue_full", "5")
            assert "1 answers are being written and 0 requests wait already, but only 1 + 0" in message
        # Whoever held the slot has hung up: it is free at the next token.
        deadline = time.monotonic() + 5
        while served.service.engine.busy and time.monotonic() < deadline:
            time.sleep(0.005)
        assert served.service.engine.metrics.answers == {"cancelled": 1}
        assert served.chat(max_tokens=2)[0] == 200


def test_an_answer_that_takes_too_long_is_a_timeout(artifact: Artifact) -> None:
    with running(str(artifact.path), slots=1, timeout_s=0.0) as served:
        status, message, _, code = error_of(served.chat())
        assert (status, code) == (504, "timeout") and "time limit" in message
        # A stream that has not begun has a status too.
        assert error_of(served.chat(stream=True))[0] == 504


def test_without_llguidance_a_schema_is_refused_and_all_else_works(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "runtimes.server.grammar", raising=False)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with running(str(artifact.path), slots=1) as served:
        status, message, param, _ = error_of(served.chat(response_format={"type": "json_object"}))
        assert (status, param) == (400, "response_format")
        assert "llguidance is not installed" in message and "fox-edge[serve]" in message
        assert served.chat(max_tokens=2)[0] == 200


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "pydantic"])
def test_a_missing_package_is_one_sentence(package: str) -> None:
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from fox_edge.cli import main; sys.exit(main(['serve', 'nowhere']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fox-edge serve: {package} is not installed; add it with: pip install")
    assert "fox-edge[serve]" in line
