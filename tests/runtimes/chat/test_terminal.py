"""What is drawn, and what commands do: lines from a list, streams that only claim to be a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from fox_edge.errors import FoxEdgeError
from fox_edge.tokenizer import Tokenizer
from runtimes.chat.chat import Chat
from runtimes.chat.commands import Commands
from runtimes.chat.conversation import load
from runtimes.chat.terminal import Terminal
from runtimes.sampling import Sampling
from tests.runtimes.chat.chatting import Parrot, Recorder, tokenizer_with


class Stream(io.StringIO):
    """Text that was drawn; `tty`: whether it claims to be a terminal."""

    def __init__(self, tty: bool = False) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


@pytest.fixture
def fox(tmp_path: Path) -> Tokenizer:
    return tokenizer_with(tmp_path / "fox", None)


def chat_that_says(tokenizer: Tokenizer, *answers: str, **settings: object) -> Chat:
    script = [[*tokenizer.encode_on(answer), tokenizer.eos_id or 0] for answer in answers]
    return Chat(Recorder(Parrot(*script)), tokenizer, **settings)  # type: ignore[arg-type]


def transcript(chat: Chat, *lines: str | BaseException, tty: bool = False) -> tuple[str, str]:
    """What the lines, one after the other, draw on stdout and stderr."""
    left: Iterator[str | BaseException] = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    out, err = Stream(tty), Stream(tty)
    Terminal(chat, "a model", out, err).run(read)
    return out.getvalue(), err.getvalue()


def test_answers_and_remarks_go_different_ways(fox: Tokenizer) -> None:
    chat = chat_that_says(fox, "one", "two", max_tokens=2)
    out, err = transcript(chat, "hi", "  ", "/undo", "/undo")
    assert out == chat.tokenizer.decode(fox.encode_on("one")[:2]) + "\n"
    assert err == "(cut after 2 tokens; /more goes on)\n(took back: hi)\n(nothing to take back)\n\n"


def test_colors_are_for_terminals_that_want_them(fox: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    dim = "\033[2m(nothing to take back)\033[0m\n\n"
    plain = "(nothing to take back)\n\n"
    assert transcript(chat_that_says(fox), "/undo", tty=True)[1] == dim
    assert transcript(chat_that_says(fox), "/undo")[1] == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert transcript(chat_that_says(fox), "/undo", tty=True)[1] == plain
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert transcript(chat_that_says(fox), "/undo", tty=True)[1] == plain


def test_a_model_cannot_steer_the_terminal(fox: Tokenizer) -> None:
    """Escape sequences are shown on a screen; in a file they are what the model said."""
    said = "a\033[2Jb\tc\nd\x9b"
    assert transcript(chat_that_says(fox, said), "x", tty=True)[0] == "a␛[2Jb\tc\nd\ufffd\n"
    assert transcript(chat_that_says(fox, said), "x")[0] == said + "\n"


def test_blocks_pasted_lines_and_slashes(fox: Tokenizer) -> None:
    chat = chat_that_says(fox, *["a"] * 5)
    transcript(chat, '"""one', "", 'two"""', '"""/three"""', "//four", "five\nfive", 'say """six', '"""')
    assert [t.question for t in chat.turns] == ["one\n\ntwo", "/three", "/four", "five\nfive", "say six"]


def test_interrupts_at_the_prompt(fox: Tokenizer) -> None:
    chat = chat_that_says(fox, "one")
    stop = KeyboardInterrupt()
    out, err = transcript(chat, stop, "hi", stop, stop, "never read")
    assert out == "one\n"
    assert err == "\n(Ctrl-C again leaves, as Ctrl-D and /quit do)\n" * 2 + "\n"


def test_what_goes_wrong_ends_an_answer_and_not_the_chat(fox: Tokenizer) -> None:
    chat = chat_that_says(fox, "one two", "three")
    ordinary, calls = chat.session.inner.prefill, []  # type: ignore[attr-defined]

    def failing(tokens: list[int]) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise FoxEdgeError("the model's logits are not numbers")
        return ordinary(tokens)

    chat.session.inner.prefill = failing  # type: ignore[attr-defined]
    out, err = transcript(chat, "x", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "/stats")
    assert out == fox.decode(fox.encode_on("one two")[:2]) + "\n"
    assert err.startswith("(the model's logits are not numbers)\n(that was not utf-8 text)\nlast answer: ")


def test_commands_that_cannot_be_obeyed(fox: Tokenizer, tmp_path: Path) -> None:
    chat = chat_that_says(fox, "one")
    transcript(chat, "hi")
    (tmp_path / "bad.json").write_text("{")
    lines = {
        "/load": "/load needs a file's name",
        f"/load {tmp_path / 'none'}": "no such file",
        f"/load {tmp_path / 'bad.json'}": "not JSON at line 1, column 2",
        "/save": "/save needs a file's name",
        f"/save {tmp_path / 'bad.json'}": "not overwritten",
        "/undo please": "/undo takes nothing after it",
        "/set heat 3": "no setting heat; there are temperature, top_p",
        "/set temperature": "temperature is '', but a number is due",
        "/set temperature hot": "temperature is 'hot', but a number is due",
        "/set temperature -2": "temperature is -2.0, but must be",
        "/set max_tokens 0": "max_tokens is 0, but must be from 1",
        "/": "no command /; there are /more, /retry",
        "/quti": "no command /quti; did you mean /quit?",
    }
    for line, words in lines.items():
        before = (chat.messages, chat.sampling, chat.max_tokens)
        out, err = transcript(chat, line)
        assert out == "" and words in err and err.count("\n") == 2, line
        assert (chat.messages, chat.sampling, chat.max_tokens) == before


def test_settings_and_system_message(fox: Tokenizer) -> None:
    chat = chat_that_says(fox)
    lines = (
        "/set top-k 40",
        "/set temperature 0.5",
        "/set max_tokens 9",
        "/system",
        "/system be  brief",
        "/system -",
    )
    assert transcript(chat, *lines)[1].splitlines() == [
        "(sampling: greedy; no limit on answers)",
        "(sampling: temperature 0.5, top_k 40; no limit on answers)",
        "(sampling: temperature 0.5, top_k 40; at most 9 tokens an answer)",
        "(no system message)",
        "(system message: be  brief)",
        "(no system message)",
        "",
    ]


def test_a_conversation_goes_on_from_its_file(fox: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    chat = chat_that_says(fox, "one", "two")
    transcript(chat, "/system be brief", "hi", f"/save {file}", "you", "/save")
    assert [t.question for t in load(file).turns] == ["hi", "you"]
    other = chat_that_says(fox, "three")
    out, err = transcript(other, f"/load {file}", "and")
    assert out == "three\n" and err == "(loaded 2 turns; sampling: greedy)\n\n"
    assert fox.decode(other.session.tokens) == fox.decode(fox.encode_chat(other.messages[:-1])) + "three"  # type: ignore[attr-defined]
    foreign = Terminal(other, "another model", Stream(), err_stream := Stream())
    foreign._obey(f"/load {file}")
    assert err_stream.getvalue() == "(loaded 2 turns, said by a model; sampling: greedy)\n"


def test_a_conversation_that_the_template_cannot_tell_changes_nothing(fox: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    transcript(chat_that_says(fox), "/system be brief", f"/save {file}")
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    chat = chat_that_says(tokenizer_with(tmp_path / "strict", strict), "one")
    transcript(chat, "hi")
    before = chat.messages
    assert "no system role" in transcript(chat, f"/load {file}")[1]
    assert "no system role" in transcript(chat, "/system be brief")[1]
    assert chat.messages == before and before[0]["role"] == "user"


def test_the_page_about_chat_knows_every_command_and_setting(fox: Tokenizer) -> None:
    page = (Path(__file__).parents[3] / "docs" / "chat.md").read_text(encoding="utf-8")
    commands = [line.split()[0] for line in Commands(chat_that_says(fox), "").help().splitlines()]
    assert len(commands) > 10
    for name in [*(c for c in commands if c.startswith("/")), *(f.name for f in fields(Sampling))]:
        assert f"`{name}`" in page or f"`{name} " in page, name
