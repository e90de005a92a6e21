"""The load's clients on a real server, and their figures on numbers made by hand."""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import threading

import pytest

from benchmarks.latency.server_load import Endpoint, Reply, Tally, load, percentile
from benchmarks.serve import measure, questions, rss_of
from fox_edge.artifact import Artifact
from fox_edge.errors import FoxEdgeError
from tests.runtimes.server.conftest import running


def test_a_measurement_of_our_own_server(nano_gguf: Artifact) -> None:
    args = argparse.Namespace(questions=4, max_tokens=12, clients=6, seconds=0.5, rounds=2, system_words=300)
    with running(str(nano_gguf.path), slots=2, queue=8) as served:
        row = measure(Endpoint(served.url, nano_gguf.path.name), None, args)
    assert (row["failed"], row["different"], row["failures"]) == (0, 0, [])
    assert row["answers"] >= 6 and row["distinct_answers"] > 1 and row["tokens_per_s"] > 0
    assert 0 < row["first_token_p50_s"] <= row["first_token_p95_s"]
    known = row["known_prompt"]
    assert known["cached_tokens"] > 0 and known["ratio"] == pytest.approx(
        known["known_first_token_s"] / known["cold_first_token_s"]
    )


def test_figures_by_hand() -> None:
    tally = Tally(seconds=10.0, rss_bytes=[10, 20, 30, 40, 50, 60, 70, 80])
    tally.replies = [Reply("x", 11, 0, n / 10, n / 10 + 2) for n in range(1, 11)]
    found = tally.summary()
    assert (found["answers"], found["tokens_per_s"], found["answers_per_s"]) == (10, 11.0, 1.0)
    assert found["client_tokens_per_s"] == pytest.approx(5.0)
    assert found["first_token_p50_s"] == pytest.approx(0.6) and found["first_token_p95_s"] == 1.0
    assert (found["rss_first_quarter_bytes"], found["rss_last_quarter_bytes"]) == (15, 75)
    assert percentile([], 0.5) is None and rss_of(None) is None


class Faulty(http.server.BaseHTTPRequestHandler):
    """A server that says something else the second time, then breaks off, then refuses."""

    asked = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Faulty.asked += 1
        self.send_response(200 if Faulty.asked < 4 else 500)
        self.end_headers()
        chunk = {"choices": [{"delta": {"content": "same" if Faulty.asked != 2 else "other"}}]}
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        if Faulty.asked != 3:
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_what_is_lost_or_mixed_up_is_counted() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Faulty)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}", "x")
    with contextlib.ExitStack() as stack:
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        tally = load(endpoint, questions(1), ["same"], 1, 0.6, 5, lambda: 7)
        assert (len(tally.replies), tally.different) == (2, [("same", "other")])
        assert "broke off after 1 pieces" in tally.failures[0] and "status 500" in tally.failures[1]
        with pytest.raises(FoxEdgeError, match="status 500"):
            endpoint.ask(questions(1)[0], 5)
    server.server_close()
