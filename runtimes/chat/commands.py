"""What a user may type in a chat beside questions: /undo, /save and the like.

Knows the conversation and its file. Draws nothing: a command gives a remark, or an answer to draw.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fox_edge.errors import FoxEdgeError
from runtimes.chat.chat import Chat
from runtimes.chat.conversation import Conversation, load, save
from runtimes.chat.stats import sampling_words, stats_lines
from runtimes.sampling import Sampling

# Names that other chats have taught their users; not in the help.
_ALIASES = {"/exit": "/quit", "/bye": "/quit", "/clear": "/reset", "/continue": "/more"}

Result = str | Generator[str] | None


@dataclass(frozen=True)
class _Command:
    run: Callable[[str], Result]
    words: str  # after the name, for help
    help: str


class Commands:
    """The commands on one conversation. `model` is the name that a saved conversation carries."""

    def __init__(self, chat: Chat, model: str) -> None:
        self._chat, self._model = chat, model
        self._file: Path | None = None
        self._table = {
            "/more": _Command(lambda _: chat.more(), "", "goes on with an answer that was cut"),
            "/retry": _Command(
                lambda _: chat.retry(), "", "asks the last question again; answers vary if sampled"
            ),
            "/undo": _Command(self._undo, "", "takes back the last question and its answer"),
            "/reset": _Command(self._reset, "", "forgets the conversation; the system message stays"),
            "/system": _Command(
                self._system, "[TEXT]", "shows or sets the system message; /system - removes it"
            ),
            "/set": _Command(self._set, "[NAME VALUE]", "shows or sets sampling: /set temperature 0.7"),
            "/save": _Command(self._save, "[FILE]", "writes the conversation as JSON"),
            "/load": _Command(self._load, "FILE", "goes on with a conversation from a file"),
            "/stats": _Command(lambda _: "\n".join(stats_lines(chat)), "", "tokens, speed, memory"),
            "/help": _Command(lambda _: self.help(), "", "this list"),
            "/quit": _Command(lambda _: None, "", "leaves, as Ctrl-D does"),
        }

    def run(self, line: str) -> Result:
        """Obey a line that begins with '/': a remark, an answer that streams, or None to leave.

        Raises FoxEdgeError for what cannot be done; the conversation is then as it was.
        """
        name, _, rest = line.strip().partition(" ")
        name = _ALIASES.get(name, name)
        if name not in self._table:
            near = difflib.get_close_matches(name, self._table, 1)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join(self._table)}"
            raise FoxEdgeError(f"no command {name[:40]}; {known}")
        command = self._table[name]
        if rest.strip() and not command.words:
            raise FoxEdgeError(f"{name} takes nothing after it")
        return command.run(rest.strip())

    def help(self) -> str:
        """One line per command, and what else can be typed."""
        rows = [(f"{name} {command.words}".strip(), command.help) for name, command in self._table.items()]
        lines = [f"{usage:<20} {help}" for usage, help in rows]
        return "\n".join(
            [
                *lines,
                '"""                  begins a text of several lines; the next """ ends it',
                "//                   begins a question that begins with /",
                "Ctrl-C               stops the answer; at the prompt it drops the line, twice it leaves",
            ]
        )

    def _undo(self, _: str) -> str:
        if not self._chat.turns:
            return "nothing to take back"
        question = self._chat.turns[-1].question
        self._chat.undo()
        return f"took back: {_short(question)}"

    def _reset(self, _: str) -> str:
        self._chat.reset()
        return "started again"

    def _system(self, text: str) -> str:
        if text:
            self._chat.instruct(None if text == "-" else text)
        system = self._chat.system
        return f"system message: {system}" if system else "no system message"

    def _set(self, text: str) -> str:
        if text:
            name, _, value = text.partition(" ")
            self._change(name.replace("-", "_"), value.strip())
        words = f"sampling: {sampling_words(self._chat.sampling)}; "
        limit = self._chat.max_tokens
        return words + ("no limit on answers" if limit is None else f"at most {limit} tokens an answer")

    def _change(self, name: str, value: str) -> None:
        chat, types = self._chat, {field.name: field.type for field in fields(Sampling)}
        if name not in types and name != "max_tokens":
            raise FoxEdgeError(f"no setting {name[:40]}; there are {', '.join([*types, 'max_tokens'])}")
        try:
            number = float(value) if types.get(name) == "float" else int(value)
        except ValueError:
            raise FoxEdgeError(f"{name} is '{value[:40]}', but a number is due") from None
        if name == "max_tokens":
            if number < 1:
                raise FoxEdgeError(f"max_tokens is {number}, but must be from 1")
            chat.max_tokens = int(number)
        else:
            wish: dict[str, Any] = {name: number}
            chat.resample(replace(chat.sampling, **wish))

    def _save(self, name: str) -> str:
        file = Path(name) if name else self._file
        if file is None:
            raise FoxEdgeError("/save needs a file's name")
        chat = self._chat
        conversation = Conversation(self._model, chat.system, tuple(chat.turns), chat.sampling)
        save(conversation, file)
        self._file = file
        return f"saved {_turns(conversation)} in {self._file}"

    def _load(self, name: str) -> str:
        if not name:
            raise FoxEdgeError("/load needs a file's name")
        conversation = load(Path(name))
        self._chat.resume(conversation.system, conversation.turns, conversation.sampling)
        self._file = Path(name)
        other = "" if conversation.model == self._model else f", said by {_short(conversation.model)}"
        return f"loaded {_turns(conversation)}{other}; sampling: {sampling_words(conversation.sampling)}"


def _turns(conversation: Conversation) -> str:
    count = len(conversation.turns)
    return f"{count} turn{'s' if count != 1 else ''}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
