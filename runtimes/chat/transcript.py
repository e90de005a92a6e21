"""A conversation as tokens: what the template writes, around what the model really said.

An answer that is decoded and encoded again need not give the tokens that the model made, and the KV cache
holds those. So the template's text is cut where answers stand in it, and they stay as they were made.
Knows tokenizers; not sessions, nor how a conversation goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fox_edge.tokenizer import Tokenizer

Message = dict[str, str]


class Transcript:
    """Encodes one conversation again and again as it grows.

    Where the tokens of the answers round-trip through the tokenizer, the result is the template's own
    rendering, token for token. Where a template writes an answer otherwise than it was said (blanks cut off
    at its end, reasoning left out), the template wins from the first character that differs.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The last rendering, and where in it the answer to its first n messages began.
        self._text = ""
        self._starts: dict[int, int] = {}

    def encode(self, messages: Sequence[Message], said: Mapping[int, Sequence[int]]) -> list[int]:
        """Token ids of messages that ask for an answer; `said`: index of an answer -> tokens as made.

        Raises TokenizerError when the template refuses the messages.
        """
        text = self._render(messages)
        ids: list[int] = []
        done = 0
        for index in sorted(said):
            start = self._start(messages[:index], text)
            if start is None:
                continue
            kept, length = self._as_written(text, start, messages[index]["content"], said[index])
            if kept:
                ids += self._encode(text[done:start], done)
                ids += said[index][:kept]
                done = start + length
        return ids + self._encode(text[done:], done)

    def _render(self, messages: Sequence[Message]) -> str:
        """The template's text; forgets what is not known any more of where answers begin."""
        text = self._tokenizer.render_chat(messages)
        old = self._text
        self._starts = {n: at for n, at in self._starts.items() if text[:at] == old[:at]}
        self._text = text
        self._starts[len(messages)] = len(text)
        return text

    def _start(self, before: Sequence[Message], text: str) -> int | None:
        """Where in the text the answer to these messages begins; None where the template tells it anew."""
        if len(before) not in self._starts:
            prompt = self._tokenizer.render_chat(before)
            if not text.startswith(prompt):
                return None
            self._starts[len(before)] = len(prompt)
        return self._starts[len(before)]

    def _as_written(self, text: str, start: int, answer: str, tokens: Sequence[int]) -> tuple[int, int]:
        """How many of an answer's tokens stand in the text at `start`, and on how many characters."""
        # A prefix space belongs to the first token, whether the template writes it or the tokenizer adds it.
        space = int(self._tokenizer.add_space_prefix and text.startswith(" ", start) and answer[:1] != " ")
        whole = answer if text.startswith(answer, start + space) else answer.rstrip()
        if not text.startswith(whole, start + space):
            return 0, 0
        stream = self._tokenizer.stream()
        kept = at = length = 0
        for count, token in enumerate(tokens, 1):
            piece = stream.push(token)
            if not whole.startswith(piece, at):
                break
            at += len(piece)
            # A character that the model left unfinished stays so.
            if stream.whole or count == len(tokens):
                kept, length = count, at
        if kept == len(tokens) and whole[length:] == stream.flush():
            length = len(whole)
        return kept, space + length if kept else 0

    def _encode(self, text: str, offset: int) -> list[int]:
        """A stretch of the template's own text, at an offset in it."""
        return self._tokenizer.encode_on(text) if offset else self._tokenizer.encode_rendered(text)
