"""Answers that follow a JSON schema or a grammar, on any runtime: llguidance says which tokens may come next.

Knows llguidance, token bytes and masks; not sessions, HTTP, or what an answer is for.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np

from fox_edge.errors import FoxEdgeError, MissingPackageError
from fox_edge.tokenizer import Tokenizer
from runtimes.base import Logits

try:
    import llguidance
    from llguidance.gbnf_to_lark import any_to_lark
except ImportError:
    raise MissingPackageError("llguidance", "serve") from None

MAX_GRAMMAR_CHARS = 1 << 16


class _Pieces:
    """A vocabulary as llguidance wants it: bytes per id, and which ids are no text."""

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        assert tokenizer.eos_id is not None
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        pieces = tokenizer.vocab_size
        self.tokens = [tokenizer.piece_bytes(id) if id < pieces else b"" for id in range(rows)]
        # A row of the model without a piece may never come, and special tokens only to end the answer.
        self.special_token_ids = sorted(tokenizer.special_ids | set(range(pieces, rows)))
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


class Grammars:
    """Makes constraints for one model. `rows`: logits per position; safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        if tokenizer.eos_id is None:
            raise FoxEdgeError("this model's tokenizer has no end token, which a grammar needs")
        wrapped = llguidance.TokenizerWrapper(_Pieces(tokenizer, rows))
        self._ends = sorted(tokenizer.stop_ids | {tokenizer.eos_id})
        self._tokenizer = llguidance.LLTokenizer(wrapped, n_vocab=rows, eos_token=self._ends)
        self._rows = rows
        self._lock = threading.Lock()

    def json(self, schema: dict[str, Any]) -> Follow:
        """A constraint to JSON, compact, of this schema; raises FoxEdgeError where it cannot be followed."""
        try:
            text = _bounded(json.dumps(schema))
            # Free white space lets a model write spaces for ever.
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_flexible": False}
            )
        except (ValueError, RecursionError) as error:
            raise FoxEdgeError(f"the schema cannot be followed: {_first_line(error)}") from None
        return self._follow(grammar)

    def grammar(self, text: str) -> Follow:
        """A constraint to a grammar in Lark's or llama.cpp's (GBNF) notation; raises FoxEdgeError."""
        try:
            lark = any_to_lark(_bounded(text))
        except Exception as error:  # the converter raises whatever it trips over
            raise FoxEdgeError(f"the grammar cannot be read: {_first_line(error)}") from None
        return self._follow(llguidance.LLMatcher.grammar_from_lark(lark))

    def _follow(self, grammar: str) -> Follow:
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # a grammar that no text ends is found out only now
        if matcher.is_error():
            raise FoxEdgeError(f"the grammar cannot be followed: {_first_line(matcher.get_error())}")
        return Follow(matcher, self._rows)


class Follow:
    """A grammar on its way through one answer; see `runtimes.generate.Constraint`."""

    def __init__(self, matcher: llguidance.LLMatcher, rows: int) -> None:
        self._matcher, self._rows = matcher, rows
        self._mask = np.zeros((rows + 31) // 32, np.int32)

    def apply(self, logits: Logits) -> None:
        """Leave only tokens with which the grammar can go on; at its end, only end tokens."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise FoxEdgeError(f"the grammar failed: {_first_line(self._matcher.get_error())}")
        allowed = np.unpackbits(self._mask.view(np.uint8), count=self._rows, bitorder="little")
        logits[allowed == 0] = -np.inf
        if not allowed.any():
            raise FoxEdgeError("the grammar leaves no token to go on with")

    def accept(self, token: int) -> None:
        """Go one token on."""
        self._matcher.consume_token(token)


def _bounded(text: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise FoxEdgeError(
            f"the schema or grammar has {len(text)} characters, but at most {MAX_GRAMMAR_CHARS} are read"
        )
    return text


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
