"""Clients of an OpenAI-compatible server: one question timed, and many clients at once for a while.

Knows HTTP and the stream of events; not which server answers, nor what it runs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from fox_edge.errors import FoxEdgeError

Messages = list[dict[str, str]]
_TIMEOUT_S = 600
_SAMPLE_S = 0.5


@dataclass(frozen=True)
class Reply:
    """One streamed answer, timed by the client."""

    text: str
    tokens: int
    cached_tokens: int | None
    first_token_s: float
    total_s: float


@dataclass(frozen=True)
class Endpoint:
    """A server and the model asked for. `url` is without /v1."""

    url: str
    model: str
    api_key: str | None = None

    def ask(self, messages: Messages, max_tokens: int) -> Reply:
        """A greedy answer, streamed. Raises FoxEdgeError when it is refused or breaks off."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=_TIMEOUT_S)
        with contextlib.closing(connection):
            try:
                return _read(connection, body, self.api_key)
            except (OSError, http.client.HTTPException) as error:
                raise FoxEdgeError(f"{self.url}: {type(error).__name__} {error}") from None


def _read(connection: http.client.HTTPConnection, body: dict[str, Any], key: str | None) -> Reply:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key or '-'}"}
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise FoxEdgeError(f"status {response.status}: {response.read(500).decode('utf-8', 'replace')}")
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    first_s, done = None, False
    for line in response:
        data = line.strip().removeprefix(b"data: ")
        if data == b"[DONE]":
            done = True
            break
        if not data or line.startswith(b":"):
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise FoxEdgeError(f"told in the stream: {chunk['error']}")
        usage = chunk.get("usage") or usage
        piece = chunk["choices"][0].get("delta", {}).get("content") if chunk["choices"] else None
        if piece:
            first_s = time.perf_counter() - start if first_s is None else first_s
            pieces.append(piece)
    if not done:
        raise FoxEdgeError(f"the stream broke off after {len(pieces)} pieces")
    total_s = time.perf_counter() - start
    details = usage.get("prompt_tokens_details") or {}
    tokens = usage.get("completion_tokens", len(pieces))
    first_s = total_s if first_s is None else first_s
    return Reply("".join(pieces), tokens, details.get("cached_tokens"), first_s, total_s)


@dataclass
class Tally:
    """What many clients saw. `different` are answers unlike the one that a lone client got."""

    replies: list[Reply] = field(default_factory=list)
    different: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The figures; percentiles are the client's own, over all answers."""
        first = sorted(reply.first_token_s for reply in self.replies)
        tokens = sum(reply.tokens for reply in self.replies)
        rates = [(r.tokens - 1) / (r.total_s - r.first_token_s) for r in self.replies if r.tokens > 1]
        return {
            "seconds": self.seconds,
            "answers": len(self.replies),
            "failed": len(self.failures),
            "different": len(self.different),
            "tokens_per_s": tokens / self.seconds,
            "answers_per_s": len(self.replies) / self.seconds,
            "first_token_p50_s": percentile(first, 0.5),
            "first_token_p95_s": percentile(first, 0.95),
            "client_tokens_per_s": median(rates) if rates else None,
            **self._memory(),
        }

    def _memory(self) -> dict[str, Any]:
        """Resident memory of the first quarter of the time and of the last: it should be the same."""
        quarter = max(1, len(self.rss_bytes) // 4)
        if not self.rss_bytes:
            return {"rss_first_quarter_bytes": None, "rss_last_quarter_bytes": None}
        return {
            "rss_first_quarter_bytes": int(median(self.rss_bytes[:quarter])),
            "rss_last_quarter_bytes": int(median(self.rss_bytes[-quarter:])),
        }


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The value that this share of the ordered ones does not exceed; None of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def load(
    endpoint: Endpoint,
    questions: Sequence[Messages],
    expected: Sequence[str],
    clients: int,
    seconds: float,
    max_tokens: int,
    rss: Callable[[], int | None],
) -> Tally:
    """So many clients ask without pause until the time is up, each beginning with another question."""
    tally, lock = Tally(), threading.Lock()
    start = time.perf_counter()

    def client(number: int) -> None:
        turn = number
        while time.perf_counter() - start < seconds:
            n = turn % len(questions)
            turn += 1
            try:
                reply = endpoint.ask(questions[n], max_tokens)
            except FoxEdgeError as error:
                with lock:
                    tally.failures.append(str(error))
                time.sleep(0.1)
                continue
            with lock:
                tally.replies.append(reply)
                if reply.text != expected[n]:
                    tally.different.append((expected[n], reply.text))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(_SAMPLE_S)
        held = rss()
        if held is not None and time.perf_counter() - start < seconds:
            tally.rss_bytes.append(held)
    tally.seconds = time.perf_counter() - start
    return tally
