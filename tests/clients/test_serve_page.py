"""The chat page in Chromium: wide and narrow, light and dark, by keyboard alone, asking nobody else."""

from __future__ import annotations

from typing import Any

import pytest

from fox_edge.artifact import Artifact
from fox_edge.tokenizer import Tokenizer
from runtimes.base import SessionOptions, open_session
from runtimes.generate import generate
from runtimes.server.slots import CHUNK
from tests.clients.helpers import HERE, need_chromium, need_node, run_node
from tests.runtimes.server.conftest import running

SIZES = {"desktop": ("900", "700", "light"), "phone": ("360", "640", "dark")}


def greedy(artifact: Artifact, question: str) -> str:
    tokenizer = Tokenizer.from_folder(artifact.path)
    session = open_session(artifact, SessionOptions(threads=1))
    prompt = tokenizer.encode_chat([{"role": "user", "content": question}])
    generation = generate(session, prompt, stop_ids=tokenizer.stop_ids, max_tokens=200)
    while generation.feed(CHUNK):
        pass
    text = tokenizer.decode(list(generation))
    session.close()
    return text


def drive(url: str, size: str, *more: str) -> dict[str, Any]:
    return run_node(need_node(HERE), "serve_page.mjs", need_chromium(), url, *SIZES[size], *more)


@pytest.mark.parametrize("size", SIZES)
def test_a_chat(nano_gguf: Artifact, size: str) -> None:
    with running(str(nano_gguf.path), slots=2) as served:
        seen = drive(f"{served.url}/", size)
        ended = served.service.engine.metrics.answers
    assert (seen["opened"], seen["focusedFirst"]) == ("ready", "question")
    assert seen["title"].startswith("nano-int8") and seen["examples"] == 2
    assert seen["facts"]["quant"] == "int8 GGUF"
    assert seen["facts"]["size"] == f"{nano_gguf.total_bytes() / 1e6:.1f} MB"
    assert seen["facts"]["context"] == "1,024 tokens" and seen["facts"]["memory"].endswith((" MB", " GB"))
    assert seen["facts"]["fidelity"] == "not verified"
    first = seen["first"]
    assert first["text"] == greedy(nano_gguf, seen["question"]) and not first["failed"]
    assert "tokens read" in first["note"] and "tokens/s" in first["note"]
    # What was said is announced once, whole; the focus stays where the next question is typed.
    assert first["announced"] == first["text"] and seen["focusedAfter"] == "question"
    assert seen["copied"] == first["text"]
    # The second question goes on from the first answer, which is still in the cache.
    assert "kept from before" in seen["second"]["note"] and len(seen["second"]["text"]) > 1
    assert seen["growing"] == {"state": "answering", "stop": True, "ask": False}
    assert seen["stopped"]["note"] == "stopped" and seen["stopped"]["text"].startswith("fox fox")
    assert seen["focusedStopped"] == "question" and ended["cancelled"] == 1
    assert (seen["turns"], seen["turnsAnew"], seen["focusedAnew"]) == (6, 0, "question")
    assert seen["overflow"] <= 0 and seen["sideways"] <= 0 and seen["formVisible"]
    assert seen["ground"] == {"desktop": "rgb(250, 248, 245)", "phone": "rgb(27, 25, 23)"}[size]
    assert seen["drawn"]["boxes"] == ["let a = 1 < 2;", "open"]
    assert seen["drawn"]["html"].startswith("&lt;b&gt;so&lt;/b&gt;")
    assert seen["body"]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert seen["body"]["max_tokens"] == 4 and "cut: no more tokens" in seen["brief"]["note"]
    assert seen["focusedClicked"] == "question"
    assert seen["complaints"] == []
    assert {url.split("/")[2] for url in seen["requests"]} == {served.url.removeprefix("http://")}


def test_a_locked_server_asks_for_its_key(nano_gguf: Artifact) -> None:
    with running(str(nano_gguf.path), key="sesame", slots=1) as served:
        seen = drive(f"{served.url}/", "desktop", "sesame")
    assert (seen["opened"], seen["focusedFirst"]) == ("locked", "key")
    assert seen["hint"] == "This server wants an API key (Settings)."
    assert seen["first"]["text"] == greedy(nano_gguf, seen["question"])
    assert seen["complaints"] == []
