"""Chats on a session that guesses ahead: the same conversation, however it is interrupted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import runtimes.lookup
from fox_edge.checkpoint import Checkpoint
from runtimes.base import Logits, SessionOptions
from runtimes.chat.chat import Chat
from runtimes.lookup import LookupSession
from runtimes.torch import TorchSession

# Answers to these say much of it again.
QUESTIONS = (
    "Tom has 15 eggs. He buys 7 more. How many eggs does he have?",
    "Tom has 16 eggs. He buys 7 more. How many eggs does he have?",
)


class Interrupted(TorchSession):
    """Is interrupted before its n-th call; 0: never."""

    def __init__(self, checkpoint: Checkpoint, call: int = 0) -> None:
        super().__init__(checkpoint, SessionOptions(threads=1), torch.float32)
        self.left = call
        self.calls = 0

    def _count(self) -> None:
        self.calls += 1
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._count()
        return super().prefill(tokens)

    def step(self, token: int) -> Logits:
        return self.prefill((token,))

    def score(self, tokens, start=0):  # type: ignore[no-untyped-def]
        self._count()
        return super().score(tokens, start)


def conversation(session: Interrupted, guessing: bool) -> list[str]:
    """Answers; one that is interrupted is gone on with."""
    chat = Chat(LookupSession(session, adaptive=False) if guessing else session, tokenizer(), max_tokens=60)
    for question in QUESTIONS:
        try:
            list(chat.ask(question))
        except KeyboardInterrupt:
            list(chat.more() if chat.cut else chat.ask(question))
    return [turn.answer for turn in chat.turns]


def tokenizer():  # type: ignore[no-untyped-def]
    return Checkpoint.open("nano").tokenizer()


@pytest.mark.parametrize("guard", [runtimes.lookup.GUARD, 9.0])
def test_guesses_and_interrupts_change_nothing(
    nano: Checkpoint, guard: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the higher guard much is run again, token by token, and an interrupt may come amidst that."""
    monkeypatch.setattr(runtimes.lookup, "GUARD", guard)
    plain, guessed = Interrupted(nano), Interrupted(nano)
    expected = conversation(plain, guessing=False)
    assert conversation(guessed, guessing=True) == expected
    assert (guessed.calls < plain.calls) == (guard < 1)
    for call in range(2, guessed.calls, 11):
        assert conversation(Interrupted(nano, call), guessing=True) == expected, call
