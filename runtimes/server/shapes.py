"""Answers in OpenAI's shapes: whole ones, and chunks of a stream.

Knows JSON shapes; not where text comes from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtimes.server.answer import Delta, TokenLogprob
from runtimes.server.engine import Outcome
from runtimes.server.errors import ApiError

DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def finish_reason(outcome: Outcome) -> str:
    """'stop' or 'length'; raises ApiError for an answer that did not come to an end of its own."""
    ending = outcome.ending
    if ending in ("stop", "read"):
        return "stop"
    if ending in ("length", "context"):
        return "length"
    if ending == "timeout":
        raise ApiError(504, "the answer took longer than the server's time limit", code="timeout")
    if ending == "shutdown":
        raise ApiError(503, "the server is shutting down", code="shutting_down")
    if ending == "cancelled":
        raise ApiError(499, "the client closed the connection", code="cancelled")
    raise ApiError(500, f"the model failed: {outcome.error}", code="model_failed")


def usage(outcome: Outcome) -> dict[str, Any]:
    """What the answer cost, in tokens."""
    return {
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": outcome.cached_tokens},
    }


@dataclass(frozen=True)
class Shape:
    """The shape of one answer, chat or plain completion; `usage`: whether a stream tells it at its end."""

    chat: bool
    id: str
    model: str
    created: int
    logprobs: bool = False
    usage: bool = False

    def whole(self, deltas: Sequence[Delta], outcome: Outcome) -> dict[str, Any]:
        """A complete answer."""
        reason = finish_reason(outcome)
        text = "".join(delta.text for delta in deltas)
        logprobs = self._logprobs([entry for delta in deltas for entry in delta.logprobs])
        choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        name = "chat.completion" if self.chat else "text_completion"
        return {**self._head(name), "choices": [choice], "usage": usage(outcome)}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream: a chat's says who speaks."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def chunk(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of one delta; the last says why the answer ended, and what it cost when asked to."""
        chunks = []
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
        if delta.text or logprobs:
            chunks.append(self._chunk({"content": delta.text} if self.chat else delta.text, logprobs))
        if delta.outcome is not None:
            reason = finish_reason(delta.outcome)
            chunks.append(self._chunk({} if self.chat else "", reason=reason))
            if self.usage:
                chunks.append({**self._stream_head(), "choices": [], "usage": usage(delta.outcome)})
        return chunks

    def _chunk(self, content: Any, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        key = "delta" if self.chat else "text"
        choice = {"index": 0, key: content, "logprobs": logprobs, "finish_reason": reason}
        return {**self._stream_head(), "choices": [choice], **({"usage": None} if self.usage else {})}

    def _stream_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            content = [
                {**_entry(e.data, e.logprob), "top_logprobs": [_entry(*other) for other in e.top]}
                for e in entries
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [_text(e.data) for e in entries],
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": [{_text(data): logprob for data, logprob in e.top} for e in entries],
            "text_offset": [e.offset for e in entries],
        }


def _entry(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(data), "logprob": logprob, "bytes": list(data)}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
