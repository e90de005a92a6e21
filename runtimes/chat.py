"""The chat loop apart from its drawing: history, the template, and a KV cache that is reused.

Knows messages, a tokenizer and a session. Does not know terminals, servers or commands.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from fox_edge.errors import ContextOverflowError
from runtimes.base import Session
from runtimes.generate import GREEDY, FinishReason, Generation, Sampling
from runtimes.prefix import PrefixCache

if TYPE_CHECKING:
    from fox_edge.tokenizer import Tokenizer

Message = dict[str, str]


class Chat:
    """A conversation. Each turn is the whole conversation encoded anew; what the cache already holds
    of it (the longest common prefix of tokens) is kept, and only the rest is run.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        system: str | None = None,
        sampling: Sampling = GREEDY,
        max_tokens: int | None = None,
    ) -> None:
        self.session, self.tokenizer = session, tokenizer
        self.system, self.sampling, self.max_tokens = system, sampling, max_tokens
        self.turns: list[Message] = []  # user and assistant in turn, complete pairs only
        self.finish_reason: FinishReason | None = None
        self._rng = sampling.rng()
        self._cache = PrefixCache(session)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the last turn's prompt: the whole conversation."""
        return self._cache.prompt_tokens

    @property
    def reused_tokens(self) -> int:
        """How many of them were in the cache and needed no run."""
        return self._cache.reused_tokens

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, the system message first."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *self.turns]

    @property
    def notice(self) -> str | None:
        """What the user should know about how the last answer ended; None when it ended by itself."""
        if self.finish_reason == "length":
            return f"the answer was cut after {self.max_tokens} tokens"
        if self.finish_reason == "context":
            return f"the context of {self.session.context} tokens is full; start again or take back a turn"
        return None

    def ask(self, text: str) -> Generator[str]:
        """Say something; yields pieces of the answer, whole characters only.

        The turn enters the history when the answer ends, or is abandoned after it has begun.
        Raises ContextOverflowError, history unchanged, when the conversation does not fit any more.
        """
        question = {"role": "user", "content": text}
        prompt = self._encode([*self.messages, question])
        generation = self._cache.generate(
            prompt, self.sampling, self.tokenizer.stop_ids, self.max_tokens, rng=self._rng
        )
        return self._answer(question, generation)

    def undo(self) -> bool:
        """Take back the last question and its answer; False when there is none."""
        if not self.turns:
            return False
        del self.turns[-2:]
        return True

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.turns.clear()
        self._cache.reset()
        self.finish_reason = None
        self._rng = self.sampling.rng()

    def _encode(self, messages: list[Message]) -> list[int]:
        """The conversation's tokens; raises ContextOverflowError when there are too many."""
        prompt = self.tokenizer.encode_chat(messages)
        if len(prompt) > self.session.context:
            raise ContextOverflowError(
                f"the conversation has {len(prompt)} tokens, but the context holds {self.session.context}; "
                "start again or take back a turn"
            )
        return prompt

    def _answer(self, question: Message, generation: Generation) -> Generator[str]:
        """Decode tokens as they come; leave the history right however this ends."""
        stream = self.tokenizer.stream()
        pieces: list[str] = []
        try:
            for token in generation:
                if piece := stream.push(token):
                    pieces.append(piece)
                    yield piece
            if piece := stream.flush():
                pieces.append(piece)
                yield piece
        finally:
            self.finish_reason = generation.finish_reason
            if pieces or generation.finish_reason:
                answer = {"role": "assistant", "content": "".join(pieces)}
                self.turns += [question, answer]
