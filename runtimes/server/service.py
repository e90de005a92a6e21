"""What is behind the routes: one model, its tokenizer, the engine, and limits; requests become jobs here.

Knows requests, tokens and the engine. Does not know the web framework.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fox_edge.errors import FoxEdgeError, TokenizerError
from fox_edge.tokenizer import Tokenizer
from runtimes.generate import Constraint
from runtimes.sampling import GREEDY, Sampling
from runtimes.server.answer import Answer
from runtimes.server.engine import Engine, Job
from runtimes.server.errors import bad_request
from runtimes.server.metrics import rss_bytes
from runtimes.server.requests import ChatRequest, CompletionRequest

if TYPE_CHECKING:
    from runtimes.server.grammar import Grammars


@dataclass
class Service:
    """One model and how it is served. `card` tells about it to whoever asks; `name` is the model's id."""

    name: str
    tokenizer: Tokenizer
    engine: Engine
    card: dict[str, Any] = field(default_factory=dict)
    sampling: Sampling = GREEDY
    max_tokens: int | None = None  # the most that one answer may have
    timeout_s: float | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def job(self, request: ChatRequest | CompletionRequest, answer: Answer) -> Job:
        """What the engine needs for a request. May take a while: not for the event loop's own thread.

        Raises ApiError (400).
        """
        prompt = self._prompt(request)
        self._check_length(prompt, request.limit)
        return Job(
            prompt,
            answer,
            request.sampling(self.sampling),
            self.tokenizer.stop_ids,
            request.limit if request.limit is not None else self.max_tokens,
            self._constraint(request),
            request.wanted_logprobs(),
            self.timeout_s,
        )

    @cached_property
    def longest_piece(self) -> int:
        """Bytes of the longest piece, and a little: more than any one token stands for."""
        return 8 + max(len(self.tokenizer.piece_bytes(id)) for id in range(self.tokenizer.vocab_size))

    @cached_property
    def grammars(self) -> Grammars:
        """What makes constraints; made when first asked for. Raises MissingPackageError."""
        from runtimes.server.grammar import Grammars

        return Grammars(self.tokenizer, self.engine.vocab_size)

    def describe(self) -> dict[str, Any]:
        """This model as an entry of /v1/models."""
        live = {
            "context": self.engine.context,
            "slots": self.engine.slots,
            "slots_busy": self.engine.busy,
            "rss_bytes": rss_bytes(),
        }
        head = {"id": self.name, "object": "model", "created": self.created, "owned_by": "fox-edge"}
        return {**head, "fox_edge": {**self.card, **live}}

    def _prompt(self, request: ChatRequest | CompletionRequest) -> list[int]:
        """The tokens of a request's prompt; raises ApiError."""
        if isinstance(request, CompletionRequest):
            prompt = request.text_or_tokens()
            if isinstance(prompt, list):
                return self._own_tokens(prompt)
            self._check_size([prompt])
            return self.tokenizer.encode(prompt, bos=self.tokenizer.add_bos, special=True)
        turns = request.turns()
        self._check_size([turn["content"] for turn in turns])
        try:
            return self.tokenizer.encode_chat(turns)
        except TokenizerError as error:
            raise bad_request(str(error), "messages") from None

    def _own_tokens(self, prompt: list[int]) -> list[int]:
        size = self.engine.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < size:
            raise bad_request(
                f"prompt has token ids {min(prompt)} to {max(prompt)}, but the last one is {size - 1}",
                "prompt",
            )
        return prompt

    def _check_size(self, texts: Sequence[str]) -> None:
        """Refuse what cannot fit without tokenizing it: megabytes would take seconds."""
        size = sum(len(text.encode("utf-8", "replace")) for text in texts)
        if size > self.engine.context * self.longest_piece:
            raise bad_request(
                f"the prompt has {size:,} bytes, more than the context of {self.engine.context} tokens holds",
                code="context_length_exceeded",
            )

    def _check_length(self, prompt: Sequence[int], limit: int | None) -> None:
        context = self.engine.context
        if not prompt:
            raise bad_request("the prompt is empty, but must have at least one token", "prompt")
        if len(prompt) > context:
            raise bad_request(
                f"the prompt has {len(prompt)} tokens, but the context holds {context}",
                code="context_length_exceeded",
            )
        most = min(context, self.max_tokens or context)
        if limit is not None and limit > most:
            raise bad_request(f"max_tokens is {limit}, but at most {most} are written here", "max_tokens")

    def _constraint(self, request: ChatRequest | CompletionRequest) -> Constraint | None:
        """What the answer must follow, if anything."""
        try:
            if request.grammar is not None:
                if request.response_format is not None:
                    raise bad_request("grammar and response_format exclude each other", "grammar")
                return self.grammars.grammar(request.grammar)
            schema = _schema(request.response_format)
            return None if schema is None else self.grammars.json(schema)
        except FoxEdgeError as error:
            param = "grammar" if request.grammar is not None else "response_format"
            raise bad_request(str(error), param) from None


def _schema(format: dict[str, Any] | None) -> dict[str, Any] | None:
    """The JSON schema that response_format asks for; None for plain text."""
    kind = "text" if format is None else format.get("type")
    if format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise bad_request(
            f"response_format.type is {json.dumps(kind)[:60]}; known: text, json_object, json_schema",
            "response_format",
        )
    named = format.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise bad_request("response_format.json_schema.schema must be an object", "response_format")
    return schema
