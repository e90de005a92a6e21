"""The chat loop: a cache kept token by token, limits, a history that is right however an answer ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from export.gguf import export_gguf
from export.onnx import export_onnx
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ContextOverflowError, FoxEdgeError, TokenizerError
from fox_edge.quant import GGUF, ONNX, find_recipe
from fox_edge.tokenizer import Tokenizer
from runtimes.base import Logits, Session, SessionOptions, open_session
from runtimes.chat.chat import Chat
from runtimes.generate import generate
from runtimes.sampling import Sampling
from runtimes.torch import TorchSession
from tests.runtimes.chat.chatting import FAITHFUL, THINKING, Parrot, Recorder, tokenizer_with

ONE = SessionOptions(threads=1)
QUESTIONS = ("the fox and hello world", "how many are there?", "in all each day", "hello")
# A random model's draws: pieces that no encoder would put side by side, halves of characters, control tokens.
WILD = Sampling(temperature=1.5, seed=5)


@pytest.fixture(scope="module", params=["torch", "llama.cpp", "onnxruntime"])
def runtime(
    request: pytest.FixtureRequest, tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    """One session per runtime; every chat empties it first."""
    out = tmp_path_factory.mktemp("chat") / "artifact"
    if request.param == "torch":
        session: Session = TorchSession(tiny_256, ONE, torch.float32)
    elif request.param == "llama.cpp":
        session = open_session(export_gguf(tiny_256, out, find_recipe(GGUF, "int8")), ONE)
    else:
        session = open_session(export_onnx(tiny_256, out, find_recipe(ONNX, "int8")), ONE)
    yield session
    session.close()


@pytest.fixture(scope="module")
def fox(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_with(tmp_path_factory.mktemp("fox"), None)


def say(chat: Chat, text: str) -> str:
    return "".join(chat.ask(text))


def parrot(tokenizer: Tokenizer, *answers: str, context: int = 4096) -> Recorder:
    """Says these texts, each ended by <eos>."""
    return Recorder(Parrot(*([*tokenizer.encode_on(a), tokenizer.eos_id] for a in answers), context=context))


@pytest.mark.parametrize("name", FAITHFUL)
def test_no_token_is_run_twice(runtime: Session, tmp_path: Path, name: str) -> None:
    # Blanks around an answer are the template's own, unless the tokenizer puts one there itself.
    llama = name == "blanks around"
    tokenizer, session = tokenizer_with(tmp_path, FAITHFUL[name], not llama), Recorder(runtime)
    chat = Chat(session, tokenizer, "be brief", WILD, max_tokens=11)
    for question in QUESTIONS:
        before, ran = session.length, session.ran
        say(chat, question)
        # All that was run before is still in use, and every token in the cache was run exactly once.
        assert chat.reply is not None and chat.reply.reused_tokens == before
        assert session.ran == session.length
        # What was made last is not in the cache yet; the rest of the prompt and of the answer is.
        made = chat.reply.tokens - (chat.reply.finish_reason == "length")
        assert session.ran - ran == chat.reply.run_tokens + made
        assert tuple(session.tokens[-made:]) == chat.turns[-1].tokens[:made]
    assert chat.run_tokens + chat.reused_tokens > chat.run_tokens
    assert any(tokenizer.encode_on(turn.answer) != list(turn.tokens) for turn in chat.turns), (
        "answers that round-trip would prove nothing"
    )


def test_a_turn_costs_its_own_tokens(runtime: Session, fox: Tokenizer) -> None:
    """Counted by hand: the end of the answer before it, the question, and the template around it."""
    session = Recorder(runtime)
    chat = Chat(session, fox, sampling=WILD, max_tokens=9)
    say(chat, QUESTIONS[0])
    for question in QUESTIONS[1:]:
        cut = int(chat.turns[-1].finish_reason == "length")
        ran = session.ran
        pieces = chat.ask(question)
        next(pieces, None)
        own = fox.encode(f"<eos>\n<|user|>\n{question}<eos>\n<|assistant|>\n", special=True)
        assert chat.reply is not None and chat.reply.run_tokens == len(own) + cut
        assert session.ran - ran >= len(own) + cut
        list(pieces)


def test_a_real_model_s_conversation_is_the_template_s_own_rendering(nano: Checkpoint) -> None:
    """nano's answers round-trip, so the cache holds what encoding everything anew would give."""
    session = Recorder(TorchSession(nano, ONE, torch.float32))
    chat = Chat(session, nano.tokenizer(), max_tokens=120)
    for question in ("A fox has 3 dens with 4 cubs each. How many cubs?", "What is 17 + 25?"):
        assert say(chat, question)
        assert chat.reply is not None and chat.reply.finish_reason == "stop"
    say(chat, "What is 8 - 3?")
    whole = nano.tokenizer().encode_chat(chat.messages[:-1])
    assert session.tokens[: len(whole)] == whole
    assert session.ran == session.length


def test_answers_are_those_of_a_fresh_session(runtime: Session, fox: Tokenizer) -> None:
    session = Recorder(runtime)
    chat = Chat(session, fox, max_tokens=9)
    for question in QUESTIONS[:3]:
        say(chat, question)
    told, last = list(session.tokens), chat.turns[-1].tokens
    prompt = told[: len(told) - len(last) + 1]
    runtime.reset()
    # Greedy on a random model: equal unless the cache held something else than these tokens.
    assert tuple(generate(runtime, prompt, stop_ids=fox.stop_ids, max_tokens=9)) == last


def test_a_template_that_tells_the_past_otherwise_costs_what_it_changes(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, THINKING)
    session = parrot(tokenizer, "the fox</think>total", "hello", "world")
    chat = Chat(session, tokenizer)
    assert say(chat, "how many") == "the fox</think>total"
    prompt = chat.reply.prompt_tokens if chat.reply else 0
    say(chat, "in all")
    # All up to the beginning of the answer is kept; the answer is told without its reasoning.
    assert chat.reply is not None and chat.reply.reused_tokens == prompt
    assert session.tokens[: chat.reply.prompt_tokens] == tokenizer.encode_chat(chat.messages[:3])
    length = session.length
    say(chat, "and")
    assert chat.reply.reused_tokens == length


def test_pieces_are_whole_characters(fox: Tokenizer) -> None:
    pieces = list(Chat(parrot(fox, "狐狸 🦊"), fox).ask("x"))
    assert pieces == ["狐", "狸", " ", "🦊"]


def test_a_character_cut_in_two_is_left_to_more(fox: Tokenizer) -> None:
    chat = Chat(parrot(fox, "a 狐"), fox, max_tokens=len(fox.encode_on("a 狐")) - 1)
    assert say(chat, "x") == "a "
    assert chat.cut and chat.reply is not None and chat.reply.finish_reason == "length"
    assert "".join(chat.more()) == "狐"
    assert chat.turns[-1].answer == "a 狐" and not chat.cut
    assert len(chat.turns) == 1


def test_more_goes_on_as_if_there_had_been_no_limit(runtime: Session, fox: Tokenizer) -> None:
    unlimited = Chat(Recorder(runtime), fox, max_tokens=24)
    whole = say(unlimited, QUESTIONS[0])
    session = Recorder(runtime)
    chat = Chat(session, fox, max_tokens=8)
    text = say(chat, QUESTIONS[0])
    text += "".join(chat.more()) + "".join(chat.more())
    assert (text, chat.turns[-1].tokens) == (whole, unlimited.turns[-1].tokens)
    assert session.ran == session.length
    say(chat, QUESTIONS[1])
    assert session.ran == session.length and len(chat.turns) == 2


def test_there_is_no_more_of_an_answer_that_ended(fox: Tokenizer) -> None:
    chat = Chat(parrot(fox, "hello"), fox)
    with pytest.raises(FoxEdgeError, match="no answer that was cut"):
        chat.more()
    say(chat, "x")
    with pytest.raises(FoxEdgeError, match="no answer that was cut"):
        chat.more()


def test_a_stop_text_ends_the_answer_before_it(fox: Tokenizer) -> None:
    session = parrot(fox, "one\n\nQ: two", "three")
    chat = Chat(session, fox, stops=["\nQ:"])
    assert say(chat, "x") == "one\n"
    assert chat.turns[-1].answer == "one\n" and not chat.cut
    session.inner.script = [*fox.encode_on("three"), fox.eos_id]  # type: ignore[attr-defined]
    assert say(chat, "y") == "three"
    assert fox.decode(session.tokens, skip_special=False).startswith(
        "<bos><|user|>\nx<eos>\n<|assistant|>\none\n<eos>\n<|user|>\ny<eos>\n<|assistant|>\nthree"
    )
    with pytest.raises(FoxEdgeError, match="stop string is empty"):
        Chat(session, fox, stops=[""])


def test_undo_and_retry(fox: Tokenizer) -> None:
    session = parrot(fox, "one", "two", "three", "four")
    chat = Chat(session, fox)
    assert not chat.undo()
    with pytest.raises(FoxEdgeError, match="no question"):
        chat.retry()
    say(chat, "a")
    say(chat, "b")
    assert "".join(chat.retry()) == "three"
    assert [(t.question, t.answer) for t in chat.turns] == [("a", "one"), ("b", "three")]
    # Only the one token that gives the first logits is run again.
    assert chat.reply is not None and chat.reply.run_tokens == 1
    assert chat.undo() and len(chat.turns) == 1
    say(chat, "c")
    assert fox.decode(session.tokens) == fox.decode(fox.encode_chat(chat.messages[:-1])) + "four"


def test_a_retry_that_never_began_keeps_the_old_answer(fox: Tokenizer) -> None:
    session = parrot(fox, "one")
    chat = Chat(session, fox)
    say(chat, "a")
    with pytest.raises(IndexError):  # the script is at its end: a runtime that fails
        list(chat.retry())
    assert [t.answer for t in chat.turns] == ["one"]


def test_reset_forgets_all_but_the_system_message(fox: Tokenizer) -> None:
    session = parrot(fox, "one", "two")
    chat = Chat(session, fox, system="be brief")
    say(chat, "hi")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be brief"}] and chat.reply is None
    say(chat, "you")
    # Its tokens, and those of the template up to the question, need not be run again.
    same = fox.encode_rendered("<|system|>\nbe brief<eos>\n<|user|>\n")
    assert chat.reply is not None and chat.reply.reused_tokens == len(same)
    assert fox.decode(session.tokens) == fox.decode(fox.encode_chat(chat.messages[:-1])) + "two"


def test_the_system_message_may_change(fox: Tokenizer, tmp_path: Path) -> None:
    session = parrot(fox, "one", "two", "three")
    chat = Chat(session, fox, system="be brief")
    say(chat, "a")
    chat.instruct("be long")
    say(chat, "b")
    assert "be long" in fox.decode(session.tokens) and "be brief" not in fox.decode(session.tokens)
    chat.instruct(None)
    assert chat.messages[0]["role"] == "user"
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    chat = Chat(session, tokenizer_with(tmp_path, strict))
    with pytest.raises(TokenizerError, match="no system role"):
        chat.instruct("be brief")
    assert chat.system is None


def test_an_answer_left_half_way_is_kept_as_far_as_it_went(fox: Tokenizer) -> None:
    session = parrot(fox, "total costs", "world")
    chat = Chat(session, fox)
    answer = chat.ask("tell me")
    said = next(answer) + next(answer)
    answer.close()
    assert chat.turns[-1].answer == said and chat.cut
    assert session.ran == session.length
    session.inner.script = [*fox.encode_on("world"), fox.eos_id]  # type: ignore[attr-defined]
    say(chat, "on")
    assert session.ran == session.length
    assert (
        fox.decode(session.tokens)
        == f"<|user|>\ntell me\n<|assistant|>\n{said}\n<|user|>\non\n<|assistant|>\nworld"
    )


def test_a_question_never_listened_to_leaves_no_trace(fox: Tokenizer) -> None:
    chat = Chat(parrot(fox, "one", "two"), fox)
    say(chat, "a")
    chat.ask("unheard")
    assert say(chat, "b") == "two"
    assert [t.question for t in chat.turns] == ["a", "b"]


def test_a_long_prompt_tells_how_far_it_is_and_may_be_interrupted(fox: Tokenizer) -> None:
    session = parrot(fox, "no", "no", "one")
    chat, told = Chat(session, fox), []

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        if told == [(0, total), (512, total)]:
            raise KeyboardInterrupt

    chat.progress = progress
    with pytest.raises(KeyboardInterrupt):
        say(chat, "fox " * 600)
    assert chat.turns == [] and session.length == 512
    total = told[0][1]
    assert told[-1] == (total, total) and total > 1024
    session.inner.script = [0, *fox.encode_on("one"), fox.eos_id]  # type: ignore[attr-defined]
    assert say(chat, "fox " * 600) == "one"
    # What was run before the interrupt was not in vain.
    assert chat.reply is not None and chat.reply.reused_tokens == 512
    assert session.ran == session.length


class Interrupted(Recorder):
    """Is interrupted at its n-th call, before or after the work is done."""

    def __init__(self, session: Session, call: int, after: bool) -> None:
        super().__init__(session)
        self.left, self.after = call, after

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        logits = super().prefill(tokens)
        if self.left == 0:
            raise KeyboardInterrupt
        return logits

    def step(self, token: int) -> Logits:
        return self.prefill([token])


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_interrupt_anywhere_leaves_a_conversation_that_goes_on(
    runtime: Session, fox: Tokenizer, call: int, after: bool
) -> None:
    session = Interrupted(runtime, call, after)
    chat = Chat(session, fox, max_tokens=9)
    with pytest.raises(KeyboardInterrupt):
        say(chat, QUESTIONS[0])
    assert len(chat.turns) == (call > 1) and chat.cut == (call > 1)
    say(chat, QUESTIONS[1])
    prompt, said = session.tokens[: len(session.tokens) - 8], chat.turns[-1].tokens
    assert fox.decode(prompt) == fox.decode(fox.encode_chat(chat.messages[:-1]))
    runtime.reset()
    assert tuple(generate(runtime, prompt, stop_ids=fox.stop_ids, max_tokens=9)) == said


# --- a full context ------------------------------------------------------------------------------------


def test_the_oldest_turns_are_left_out_whole(fox: Tokenizer) -> None:
    session = parrot(fox, *["hello world"] * 12, context=200)
    chat = Chat(session, fox, system="be brief", max_tokens=20)
    left_out = []
    for n in range(12):
        assert say(chat, f"the fox {n}") == "hello world"
        assert chat.reply is not None
        left_out.append(chat.reply.left_out)
        seen = fox.decode(session.tokens)
        assert seen.startswith("<|system|>\nbe brief\n<|user|>\nthe fox ")
        assert f"the fox {chat.left_out}\n" in seen and f"the fox {chat.left_out - 1}\n" not in seen
        assert chat.reply.prompt_tokens + 20 <= 200
        if chat.reply.left_out:
            assert chat.reply.prompt_tokens <= 100
        elif n:
            assert chat.reply.reused_tokens > 0.6 * chat.reply.prompt_tokens
    # Several turns at a time, so that most turns still cost only their own tokens; none is forgotten.
    assert sum(n > 0 for n in left_out) < 4 and sum(left_out) == chat.left_out
    assert len(chat.turns) == 12
    # Taking turns back brings the older ones back into sight.
    for _ in range(11):
        chat.undo()
    assert chat.left_out == 0


def test_a_question_that_does_not_fit_changes_nothing(fox: Tokenizer) -> None:
    chat = Chat(parrot(fox, "one", "two", context=60), fox)
    say(chat, "hi")
    with pytest.raises(ContextOverflowError, match=r"the question alone takes \d+ tokens.* context holds 60"):
        chat.ask("x" * 60)
    assert len(chat.turns) == 1 and chat.left_out == 0
    assert say(chat, "yo") == "two"


def test_an_answer_that_fills_the_context_goes_on_without_the_oldest_turns(fox: Tokenizer) -> None:
    session = parrot(fox, "world " * 8, "hello " * 30, context=150)
    chat = Chat(session, fox)
    say(chat, "the fox")
    first = say(chat, "go")
    assert chat.reply is not None and chat.reply.finish_reason == "context" and session.length == 150
    assert chat.cut and chat.left_out == 0
    session.inner.script = fox.encode_on("world " * 30)  # type: ignore[attr-defined]
    more = "".join(chat.more())
    assert chat.left_out == 1 and chat.turns[-1].answer == first + more
    assert fox.decode(session.tokens).startswith("<|user|>\ngo\n<|assistant|>\nhello hello")
    # By now the answer itself fills the context: that is said, with the numbers.
    with pytest.raises(ContextOverflowError, match=r"what was answered so far takes \d+ tokens.* holds 150"):
        chat.more()
    assert chat.turns[-1].answer == first + more


def test_sampled_answers_repeat_with_the_seed_and_vary_from_try_to_try(
    runtime: Session, fox: Tokenizer
) -> None:
    def answers(seed: int) -> list[str]:
        chat = Chat(Recorder(runtime), fox, sampling=Sampling(1.0, seed=seed), max_tokens=12)
        return [say(chat, "same"), "".join(chat.retry())]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    assert answers(1)[0] != answers(1)[1]
