"""The chat loop apart from its drawing: history, the template, and a KV cache that is kept from turn to turn.

Knows messages, a tokenizer and a session. Does not know terminals, servers, files or commands.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fox_edge.errors import ContextOverflowError, FoxEdgeError
from runtimes.base import Session
from runtimes.chat.transcript import Message, Transcript
from runtimes.generate import FinishReason, Generation
from runtimes.prefix import PrefixCache
from runtimes.sampling import GREEDY, Sampling
from runtimes.stop_strings import StopStrings

if TYPE_CHECKING:
    from fox_edge.tokenizer import Tokenizer

# Of the context, the share that a question leaves to its answer, and the share that old turns may keep
# once some of them had to go: enough room for several turns, so that not every turn runs everything anew.
_ANSWER_SHARE = 4
_KEPT_SHARE = 2
# Tokens of a prompt that run before progress is told.
_PROMPT_PART = 512


@dataclass(frozen=True)
class Turn:
    """A question and its answer. `first`: the oldest turn that the model saw when it answered."""

    question: str
    answer: str = ""
    tokens: tuple[int, ...] = field(default=(), repr=False)  # as the model made them; none in a loaded turn
    first: int = 0
    finish_reason: FinishReason | None = "stop"  # None: the user stopped it


@dataclass
class Reply:
    """What the newest answer took. `prompt_tokens` are all that came before it, `reused_tokens` of them were
    in the cache already; `left_out` turns no longer fitted. `first_s`: until there was text."""

    prompt_tokens: int
    reused_tokens: int
    left_out: int
    tokens: int = 0
    finish_reason: FinishReason | None = None
    first_s: float | None = None
    total_s: float = 0.0

    @property
    def run_tokens(self) -> int:
        """Tokens of the prompt that were not in the cache."""
        return self.prompt_tokens - self.reused_tokens

    @property
    def prompt_tokens_per_s(self) -> float | None:
        """Of the tokens that were run; None before there was text."""
        return self.run_tokens / self.first_s if self.first_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of all tokens but the first; None for a shorter answer."""
        decoding_s = self.total_s - (self.first_s or self.total_s)
        return (self.tokens - 1) / decoding_s if decoding_s > 0 and self.tokens > 1 else None


class Chat:
    """A conversation. No token is computed twice as long as the template tells the past as it was: answers
    stay in the cache as they were made, and a turn costs its own tokens.

    When a conversation outgrows the context, its oldest turns are left out, whole; the system message stays.
    `stops` are texts that end an answer, beside the tokenizer's stop tokens.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        system: str | None = None,
        sampling: Sampling = GREEDY,
        max_tokens: int | None = None,
        stops: Sequence[str] = (),
    ) -> None:
        StopStrings(stops)  # refuses bad ones
        self.session, self.tokenizer, self.stops = session, tokenizer, tuple(stops)
        self.system, self.sampling, self.max_tokens = system, sampling, max_tokens
        # Told while a long prompt runs: how many of its tokens are done, of how many.
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self.turns: list[Turn] = []
        self.reply: Reply | None = None
        self.run_tokens = self.reused_tokens = 0  # of all prompts so far
        self._rng = sampling.rng()
        self._cache, self._transcript = PrefixCache(session), Transcript(tokenizer)

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, the system message first."""
        return _messages(self.system, self.turns)

    @property
    def left_out(self) -> int:
        """How many of the oldest turns the model no longer sees."""
        return self.turns[-1].first if self.turns else 0

    @property
    def cut(self) -> bool:
        """Whether the last answer was ended by a limit or by the user, so that `more` can go on."""
        return bool(self.turns) and self.turns[-1].finish_reason != "stop"

    def ask(self, text: str) -> Generator[str]:
        """Say something; yields pieces of the answer, whole characters only.

        The turn enters the history when the answer ends, or is abandoned after it has begun. Raises
        ContextOverflowError, the conversation unchanged, when not even this question fits the context.
        """
        return self._ask(self.turns, text)

    def retry(self) -> Generator[str]:
        """Ask the last question again; its answer is replaced once the new one has begun."""
        if not self.turns:
            raise FoxEdgeError("there is no question to ask again")
        return self._ask(self.turns[:-1], self.turns[-1].question)

    def more(self) -> Generator[str]:
        """Go on with an answer that was cut."""
        if not self.cut:
            raise FoxEdgeError("there is no answer that was cut")
        *before, turn = self.turns
        return self._talk(before, turn, *self._fit(before, turn))

    def undo(self) -> bool:
        """Take back the last question and its answer; False when there is none."""
        found = bool(self.turns)
        self.turns = self.turns[:-1]
        return found

    def reset(self) -> None:
        """Forget the conversation; the system message stays, and what the cache holds of it."""
        self.turns, self.reply = [], None
        self._rng = self.sampling.rng()

    def instruct(self, system: str | None) -> None:
        """Change the system message; raises TokenizerError, nothing changed, when the template has none."""
        self._render(system, self.turns)
        self.system = system

    def resample(self, sampling: Sampling) -> None:
        """Choose tokens otherwise from the next answer on."""
        self.sampling, self._rng = sampling, sampling.rng()

    def resume(self, system: str | None, turns: Sequence[Turn], sampling: Sampling) -> None:
        """Go on with another conversation; raises TokenizerError, nothing changed, when the template cannot
        tell it."""
        self._render(system, turns)
        self.system, self.turns, self.reply = system, list(turns), None
        self.resample(sampling)

    def _render(self, system: str | None, turns: Sequence[Turn]) -> None:
        self.tokenizer.render_chat([*_messages(system, turns), {"role": "user", "content": "?"}])

    def _ask(self, before: Sequence[Turn], text: str) -> Generator[str]:
        turn = Turn(text, first=before[-1].first if before else 0)
        return self._talk(before, turn, *self._fit(before, turn))

    def _fit(self, before: Sequence[Turn], turn: Turn) -> tuple[list[int], int]:
        """The tokens that the model goes on from, and the oldest turn in them."""
        context = self.session.context
        room = context // _ANSWER_SHARE if self.max_tokens is None else self.max_tokens
        tokens = self._tokens(before, turn, turn.first)
        if len(tokens) + min(room, context // _ANSWER_SHARE) <= context:
            return tokens, turn.first
        # The fewest turns to leave out so that the others keep to their share; if need be, all of them.
        firsts = range(turn.first, len(before))
        first = turn.first + bisect.bisect_left(
            firsts, True, key=lambda n: len(self._tokens(before, turn, n)) <= context // _KEPT_SHARE
        )
        tokens = self._tokens(before, turn, first)
        if len(tokens) >= context:
            what = "the question alone" if not turn.tokens else "the question with what was answered so far"
            raise ContextOverflowError(
                f"{what} takes {len(tokens)} tokens, template and system message included, but the context "
                f"holds {context}, and the answer needs room too"
            )
        return tokens, first

    def _tokens(self, before: Sequence[Turn], turn: Turn, first: int) -> list[int]:
        """The conversation from turn `first` on, up to what was said of the turn's answer so far."""
        seen = before[first:]
        messages = _messages(self.system, seen)
        opening = len(messages) - 2 * len(seen)
        said = {opening + 2 * n + 1: past.tokens for n, past in enumerate(seen) if past.tokens}
        messages.append({"role": "user", "content": turn.question})
        return self._transcript.encode(messages, said) + list(turn.tokens)

    def _talk(self, before: Sequence[Turn], turn: Turn, prompt: Sequence[int], first: int) -> Generator[str]:
        """Start on an answer, or on the rest of one."""
        generation = self._cache.generate(
            prompt, self.sampling, self.tokenizer.stop_ids, self.max_tokens, rng=self._rng
        )
        reply = Reply(self._cache.prompt_tokens, self._cache.reused_tokens, first - turn.first)
        self.reply = reply
        self.run_tokens += reply.run_tokens
        self.reused_tokens += reply.reused_tokens
        return self._speak(list(before), turn, first, generation, reply)

    def _speak(
        self, before: list[Turn], turn: Turn, first: int, generation: Generation, reply: Reply
    ) -> Generator[str]:
        """Decode tokens as they come; leave the history right however this ends."""
        said, stops, start = list(turn.tokens), StopStrings(self.stops), time.monotonic()
        try:
            self._read(generation, reply.run_tokens)
            for piece in self._pieces(generation, said, stops):
                if reply.first_s is None:
                    reply.first_s = time.monotonic() - start
                yield piece
        finally:
            reply.total_s = time.monotonic() - start
            reply.tokens = len(said) - len(turn.tokens)
            reply.finish_reason = "stop" if stops.found is not None else generation.finish_reason
            if reply.tokens or reply.finish_reason:
                # An interrupt may come between any two steps: only the tokens tell what was said.
                answer = self._text(said, reply.finish_reason)
                self.turns = [*before, Turn(turn.question, answer, tuple(said), first, reply.finish_reason)]

    def _read(self, generation: Generation, total: int) -> None:
        """Run all of a prompt but its last part, and tell how far it is."""
        try:
            done = 0
            self.progress(done, total)
            while generation.feed(_PROMPT_PART):
                done += _PROMPT_PART
                self.progress(done, total)
        finally:
            self.progress(total, total)

    def _pieces(self, generation: Generation, said: list[int], stops: StopStrings) -> Iterator[str]:
        """The text of the tokens, which are added to `said`, up to a stop string."""
        stream = self.tokenizer.stream()
        for token in said:
            stream.push(token)
        for token in generation:
            said.append(token)
            if piece := stops.push(stream.push(token)):
                yield piece
            if stops.found is not None:
                return
        # A character that a limit has cut in two is left to `more`.
        rest = stream.flush() if generation.finish_reason == "stop" else ""
        if piece := stops.push(rest) + stops.flush():
            yield piece

    def _text(self, tokens: Sequence[int], finish_reason: FinishReason | None) -> str:
        """What `_pieces` gave of these tokens."""
        stream, stops = self.tokenizer.stream(), StopStrings(self.stops)
        text = stops.push("".join([stream.push(token) for token in tokens]))
        return text + stops.push(stream.flush() if finish_reason == "stop" else "") + stops.flush()


def _messages(system: str | None, turns: Sequence[Turn]) -> list[Message]:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages
