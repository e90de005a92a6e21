"""Conversations as tokens, against stretches encoded by hand and against the template's whole rendering."""

from __future__ import annotations

from pathlib import Path

import pytest

from fox_edge.tokenizer import Tokenizer
from runtimes.chat.transcript import Transcript
from tests.runtimes.chat.chatting import FAITHFUL, THINKING, TRIMMED, tokenizer_with

QUESTIONS = ["the fox and hello world", "how many are there?", "in all each day"]


def conversation(answers: list[str]) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    for question, answer in zip(QUESTIONS[1:], answers, strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return messages


def odd(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text that no encoder would choose: a piece per character."""
    ids = [id for char in text for id in tokenizer.encode_on(char)]
    assert tokenizer.decode(ids) == text and ids != tokenizer.encode_on(text)
    return ids


@pytest.fixture
def fox(tmp_path: Path) -> Tokenizer:
    return tokenizer_with(tmp_path, None)


@pytest.mark.parametrize("gemma", [True, False])
@pytest.mark.parametrize("name", FAITHFUL)
def test_answers_that_round_trip_give_the_template_s_own_tokens(
    tmp_path: Path, name: str, gemma: bool
) -> None:
    tokenizer = tokenizer_with(tmp_path, FAITHFUL[name], gemma)
    messages = conversation(["there are total costs", "world."])
    whole = tokenizer.encode_chat(messages)
    # The tokens of the answers as they stand in the whole: where else could a canonical model take them from?
    said = {}
    for index in (1, 3):
        before = len(tokenizer.encode_chat(messages[:index]))
        text = messages[index]["content"]
        length = next(n for n in range(30) if tokenizer.decode(whole[before : before + n]).lstrip() == text)
        said[index] = whole[before : before + length]
    assert Transcript(tokenizer).encode(messages, said) == whole


def test_what_was_said_stays_and_only_the_template_s_text_is_encoded(fox: Tokenizer) -> None:
    messages = conversation(["there are total costs", "hello"])
    said = {1: odd(fox, "there are total costs"), 3: odd(fox, "hello")}
    expected = [
        *fox.encode_rendered(f"<|user|>\n{QUESTIONS[0]}<eos>\n<|assistant|>\n"),
        *said[1],
        *fox.encode(f"<eos>\n<|user|>\n{QUESTIONS[1]}<eos>\n<|assistant|>\n", special=True),
        *said[3],
        *fox.encode(f"<eos>\n<|user|>\n{QUESTIONS[2]}<eos>\n<|assistant|>\n", special=True),
    ]
    assert Transcript(fox).encode(messages, said) == expected
    assert fox.encode_chat(messages) != expected
    assert fox.decode(expected) == fox.decode(fox.encode_chat(messages))
    # An answer that nobody has the tokens of is encoded like the rest.
    assert Transcript(fox).encode(messages, {}) == fox.encode_chat(messages)


def test_every_prompt_goes_on_from_the_one_before(fox: Tokenizer) -> None:
    """Asked again as the conversation grows, it begins with what was run."""
    transcript = Transcript(fox)
    messages = conversation(["there are total costs", "hello\n\nworld"])
    said: dict[int, list[int]] = {}
    ran: list[int] = []
    for index in (1, 3, 5):
        prompt = transcript.encode(messages[:index], said)
        assert prompt[: len(ran)] == ran
        if index < 5:
            said[index] = odd(fox, messages[index]["content"])
            ran = prompt + said[index]


def test_blanks_that_the_template_cuts_off_are_all_that_is_lost(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, TRIMMED)
    messages = conversation(["total costs \n"])
    tokens = odd(tokenizer, "total costs") + tokenizer.encode_on(" \n")
    ids = Transcript(tokenizer).encode(messages, {1: tokens})
    before = tokenizer.encode_chat(messages[:1])
    assert ids[: len(before)] == before
    assert ids[len(before) :] == odd(tokenizer, "total costs") + tokenizer.encode(
        f"<end_of_turn>\n<start_of_turn>user\n{QUESTIONS[1]}<end_of_turn>\n<start_of_turn>model\n",
        special=True,
    )


def test_a_template_that_leaves_reasoning_out_wins(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, THINKING)
    messages = conversation(["the fox</think>total"])
    said = {1: odd(tokenizer, "the fox</think>total")}
    assert Transcript(tokenizer).encode(messages, said) == tokenizer.encode_chat(messages)


def test_an_answer_cut_by_a_stop_text_ends_there(fox: Tokenizer) -> None:
    """The token that holds the stop text's beginning is told anew, in part."""
    last = next(id for id, p in enumerate(fox.pieces()) if p.kind == "normal" and len(p.text) > 3)
    messages = conversation(["hello" + fox.decode([last])[:2]])
    said = {1: [*odd(fox, "hello"), last]}
    ids = Transcript(fox).encode(messages, said)
    before = fox.encode_chat(messages[:1])
    assert ids[len(before) :][: len(said[1]) - 1] == odd(fox, "hello")
    assert fox.decode(ids) == fox.decode(fox.encode_chat(messages))


def test_a_character_left_unfinished_stays_as_it_was_made(fox: Tokenizer) -> None:
    half = [*fox.encode("hello "), *fox.encode("狐")[:-1]]
    ids = Transcript(fox).encode(conversation(["hello "]), {1: half})
    before = fox.encode_chat(conversation([])[:1])
    assert ids[len(before) : len(before) + len(half) + 1] == [*half, fox.eos_id]
    # Ended by the model itself, it was shown as U+FFFD, and is still no more than what was made.
    ids = Transcript(fox).encode(conversation(["hello \ufffd"]), {1: half})
    assert ids[len(before) : len(before) + len(half) + 1] == [*half, fox.eos_id]


def test_control_tokens_inside_an_answer_stay(fox: Tokenizer) -> None:
    """They are no text, but the model has seen them."""
    turn = fox.id_of("<start_of_turn>")
    assert turn is not None
    tokens = [*fox.encode("hello"), turn, *fox.encode(" world"), turn]
    ids = Transcript(fox).encode(conversation(["hello world"]), {1: tokens})
    before = fox.encode_chat(conversation([])[:1])
    assert ids[len(before) : len(before) + len(tokens) + 1] == [*tokens, fox.eos_id]


def test_a_prefix_space_belongs_to_the_first_token(tmp_path: Path) -> None:
    """A Llama-like template writes the blank that the model's first token brings along."""
    tokenizer = tokenizer_with(tmp_path, FAITHFUL["blanks around"], gemma=False)
    messages = conversation(["total costs"])
    first = tokenizer.encode("total costs")
    assert tokenizer.piece_bytes(first[0])[:1] == b" "
    ids = Transcript(tokenizer).encode(messages, {1: first})
    before = tokenizer.encode_chat(messages[:1])
    assert ids[: len(before) + len(first)] == before + first
    assert ids == tokenizer.encode_chat(messages)


def test_a_changed_beginning_is_told_anew(fox: Tokenizer) -> None:
    """One transcript, two conversations: what is remembered of the first does not leak into the second."""
    transcript, messages = Transcript(fox), conversation(["hello", "in all"])
    said = {1: odd(fox, "hello"), 3: odd(fox, "in all")}
    transcript.encode(messages, said)
    other = [{"role": "system", "content": "in all"}, *messages]
    moved = {index + 1: tokens for index, tokens in said.items()}
    assert transcript.encode(other, moved) == Transcript(fox).encode(other, moved)
    assert transcript.encode(messages[2:], {1: said[3]}) == Transcript(fox).encode(messages[2:], {1: said[3]})
