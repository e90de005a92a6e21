"""The chat loop on a small random model: text, history, and a cache that is reused without a trace."""

import numpy as np
import pytest
import torch

from fox_edge.config import FoxConfig
from fox_edge.errors import ContextOverflowError
from fox_edge.model import Fox
from runtimes.base import SessionOptions
from runtimes.chat import Chat
from runtimes.generate import Sampling
from runtimes.torch import TorchSession

EOS, BOS, TURN = 0, 1, 2
CONFIG = FoxConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
    max_positions=400,
    tied=False,  # a tied random model only repeats itself
)


class RandomSource:
    config = CONFIG

    def load_model(self, dtype=torch.float32, device="cpu") -> Fox:
        torch.manual_seed(3)
        return Fox(CONFIG)


class Letters:
    """A tokenizer of ASCII letters, one id each, whose stream lets them out in pairs."""

    stop_ids = frozenset({EOS})

    def encode_chat(self, messages) -> list[int]:
        ids = [BOS]
        for message in messages:
            ids += [TURN, ord(message["role"][0]), *map(ord, message["content"]), EOS]
        return [*ids, TURN, ord("a")]

    def stream(self):
        class Stream:
            held = ""

            def push(self, token: int) -> str:
                self.held += chr(token)
                if len(self.held) < 2:
                    return ""
                out, self.held = self.held, ""
                return out

            def flush(self) -> str:
                out, self.held = self.held, ""
                return out

        return Stream()


class CountingSession(TorchSession):
    """Counts the tokens that were run."""

    def __init__(self, context: int = 400) -> None:
        super().__init__(RandomSource(), SessionOptions(context=context), torch.float32)
        self.ran: list[int] = []

    def prefill(self, tokens):
        self.ran.append(len(tokens))
        return super().prefill(tokens)


def fresh_answer(messages, max_tokens: int) -> str:
    """The answer of a session that has seen nothing before."""
    from runtimes.generate import generate

    letters = Letters()
    tokens = generate(
        CountingSession(), letters.encode_chat(messages), stop_ids=letters.stop_ids, max_tokens=max_tokens
    )
    return "".join(map(chr, tokens))


def test_answers_equal_those_of_a_fresh_session_and_only_new_tokens_are_run():
    session = CountingSession()
    chat = Chat(session, Letters(), system="be brief", max_tokens=9)
    for question in ("hello", "and more", "bye"):
        before = chat.messages
        session.ran.clear()
        answer = "".join(chat.ask(question))
        assert answer == fresh_answer([*before, {"role": "user", "content": question}], 9)
        assert chat.finish_reason == "length"
        assert session.ran[0] == chat.prompt_tokens - chat.reused_tokens
    # The third prompt repeats two turns; all but the newest question (and the answer's last token) is reused.
    assert chat.reused_tokens > 30
    assert session.ran[0] <= len("bye") + 8
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3]


def test_pieces_are_streamed_and_flushed():
    pieces = list(Chat(CountingSession(), Letters(), max_tokens=5).ask("x"))
    assert [len(p) for p in pieces] == [2, 2, 1]


def test_undo_forgets_one_turn_as_if_it_had_not_been():
    chat = Chat(CountingSession(), Letters(), max_tokens=6)
    assert not chat.undo()
    first = "".join(chat.ask("one"))
    list(chat.ask("two"))
    assert chat.undo()
    assert chat.messages[-1] == {"role": "assistant", "content": first}
    expected = fresh_answer([*chat.messages, {"role": "user", "content": "three"}], 6)
    assert "".join(chat.ask("three")) == expected


def test_reset_forgets_all_but_the_system_message():
    chat = Chat(CountingSession(), Letters(), system="s", max_tokens=4)
    first = "".join(chat.ask("one"))
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "s"}]
    assert chat.session.length == 0
    assert "".join(chat.ask("one")) == first
    assert chat.reused_tokens == 0


def test_an_answer_left_half_way_is_kept_as_far_as_it_went():
    chat = Chat(CountingSession(), Letters(), max_tokens=50)
    answer = chat.ask("tell me")
    said = next(answer) + next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    expected = fresh_answer([*chat.messages, {"role": "user", "content": "on"}], 7)
    chat.max_tokens = 7
    assert "".join(chat.ask("on")) == expected


def test_a_question_never_listened_to_leaves_no_trace():
    chat = Chat(CountingSession(), Letters(), max_tokens=6)
    list(chat.ask("one"))
    chat.ask("unheard")
    expected = fresh_answer([*chat.messages, {"role": "user", "content": "two"}], 6)
    assert "".join(chat.ask("two")) == expected
    assert len(chat.turns) == 4


def test_a_conversation_too_long_is_refused_and_can_be_shortened():
    chat = Chat(CountingSession(context=40), Letters(), max_tokens=4)
    list(chat.ask("0123456789"))
    with pytest.raises(ContextOverflowError, match=r"\d+ tokens, but the context holds 40"):
        chat.ask("x" * 30)
    assert len(chat.turns) == 2
    assert chat.undo()
    assert "".join(chat.ask("hi"))


def test_an_answer_that_fills_the_context_is_noticed():
    chat = Chat(CountingSession(context=20), Letters())
    answer = "".join(chat.ask("hey"))
    assert chat.finish_reason == "context"
    assert "20 tokens is full" in chat.notice
    assert chat.session.length == 20
    assert answer


def test_a_cut_answer_is_noticed():
    chat = Chat(CountingSession(), Letters(), max_tokens=3)
    list(chat.ask("hey"))
    assert chat.notice == "the answer was cut after 3 tokens"


def test_sampled_answers_repeat_with_the_seed_and_vary_from_turn_to_turn():
    def answers(seed: int) -> list[str]:
        chat = Chat(CountingSession(), Letters(), sampling=Sampling(1.0, seed=seed), max_tokens=12)
        said = ["".join(chat.ask("same"))]
        chat.undo()
        return [*said, "".join(chat.ask("same"))]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    assert answers(1)[0] != answers(1)[1]
    assert np.all([len(a) > 0 for a in answers(1)])
