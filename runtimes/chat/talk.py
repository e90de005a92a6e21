"""Opens a model to be talked to: by a person at a terminal, or by a script with one question.

For a script stdout has the answer and nothing else. Knows stdin and stdout; not what is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

from fox_edge.chat_template import FOX_TEMPLATE
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import say
from runtimes.base import Session, SessionOptions
from runtimes.chat.chat import Chat
from runtimes.chat.model import ChatModel, find_chat_model
from runtimes.chat.stats import memory_words, reply_json, sampling_words
from runtimes.chat.terminal import HINT, Reading, Terminal, reader
from runtimes.sampling import Sampling

# More than fits any context, and little enough to hold.
_MAX_STDIN_BYTES = 64 << 20
_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Wishes:
    """What the user asks for beyond the model. `sampling`: the fields of Sampling that were given."""

    system: str | None = None
    sampling: dict[str, Any] | None = None
    max_tokens: int | None = None
    stops: Sequence[str] = ()


def talk(
    spec: str, options: SessionOptions, wishes: Wishes, question: str | None = None, as_json: bool = False
) -> None:
    """Talk until the user leaves; with a question, or one on stdin, answer it and return.

    Raises FoxEdgeError for what cannot be opened or answered.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows another
            stream.reconfigure(errors="replace")
    model = find_chat_model(spec)
    interactive = question is None and sys.stdin is not None and sys.stdin.isatty()
    if interactive and as_json:
        raise FoxEdgeError("--json is for one question: give it with --prompt, or on stdin")
    asked = "" if interactive else whole_question(question, read_piped())
    tokenizer = model.tokenizer()
    notes = [*model.notes, *(note for note in tokenizer.notes if note not in model.notes)]
    # An export carries the format that it fell back to like a template of the checkpoint's own.
    if tokenizer.chat_template == FOX_TEMPLATE and not any("chat template" in note for note in notes):
        notes.append("the checkpoint came without a chat template; Fox's own format is used")
    sampling, remark = _sampling(model, wishes.sampling or {})
    for note in (*notes, *([remark] if remark else [])):
        say(f"note: {note}")
    start = time.monotonic()
    with contextlib.closing(model.open(options)) as session:
        load_s = time.monotonic() - start
        chat = Chat(session, tokenizer, None, sampling, wishes.max_tokens, wishes.stops)
        chat.instruct(wishes.system)
        chat.progress = Reading()
        if interactive:
            say(_headline(model, session, sampling))
            say(HINT)
            Terminal(chat, model.name, sys.stdout, sys.stderr).run(reader())
        else:
            _answer(chat, asked, {"model": model.name, "runtime": model.runtime, "load_s": load_s}, as_json)


def whole_question(question: str | None, piped: str) -> str:
    """A question and what was piped in after it; raises FoxEdgeError when there is neither."""
    whole = "\n".join(part for part in (question, piped.rstrip("\n")) if part)
    if not whole.strip():
        raise FoxEdgeError("there is no question: give one with --prompt, or on stdin")
    return whole


def read_piped() -> str:
    """What was piped into this process, '' without a pipe; raises FoxEdgeError when it is no UTF-8 text."""
    try:
        if sys.stdin is None or sys.stdin.isatty():
            return ""
        _explain_waiting(sys.stdin)
        data = sys.stdin.buffer.read(_MAX_STDIN_BYTES + 1)
    except (OSError, ValueError, AttributeError):  # closed, or no file at all
        return ""
    if len(data) > _MAX_STDIN_BYTES:
        raise FoxEdgeError(f"stdin has more than {_MAX_STDIN_BYTES} bytes, which no context holds")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FoxEdgeError(f"stdin is not UTF-8 text (byte {error.start} is no part of any)") from None


def _explain_waiting(stdin: TextIO) -> None:
    """A pipe that stays open and silent would be waited for without a word."""
    ready = True
    with contextlib.suppress(
        OSError, ValueError
    ):  # no file, or a system where only sockets can be waited for
        file = stdin.fileno()
        ready = stat.S_ISREG(os.fstat(file).st_mode) or bool(select.select([file], [], [], _PATIENCE_S)[0])
    if not ready:
        say("(waiting for the end of stdin, which belongs to the question; < /dev/null does without)")


def _sampling(model: ChatModel, said: dict[str, Any]) -> tuple[Sampling, str | None]:
    """The model's own wish with what the user said instead, and a remark."""
    wish, remark = model.sampling()
    sampling = replace(wish, **said)
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbelow(1 << 31))  # told, so that it can be repeated
    cuts = [name for name in ("top_p", "top_k", "min_p", "seed") if name in said]
    if sampling.temperature == 0 and cuts:
        remark = f"--{cuts[0].replace('_', '-')} does nothing at temperature 0"
    return sampling, remark


def _headline(model: ChatModel, session: Session, sampling: Sampling) -> str:
    """What was opened, in one line."""
    wish = (
        " (as its generation_config.json asks)"
        if sampling.temperature and model.sampling()[0].temperature
        else ""
    )
    return (
        f"{model.name}, on {model.runtime}; context of {session.context:,} tokens{memory_words()}; "
        f"{sampling_words(sampling)}{wish}"
    )


def _answer(chat: Chat, question: str, about: dict[str, Any], as_json: bool) -> None:
    """One answer on stdout, as it comes or in one JSON document; remarks on stderr."""
    said: list[str] = []
    for piece in chat.ask(question):
        said.append(piece)
        if not as_json:
            print(piece, end="", flush=True)
    reply = chat.reply
    assert reply is not None
    if as_json:
        answer = {"answer": "".join(said), **reply_json(reply), "sampling": sampling_words(chat.sampling)}
        print(json.dumps({**about, **answer}, ensure_ascii=False), flush=True)
    else:
        print(flush=True)
    if reply.finish_reason == "length":
        say(f"(cut after {reply.tokens} tokens; --max-tokens allows more)")
    elif reply.finish_reason == "context":
        say(f"(cut: the context of {chat.session.context} tokens is full; --context opens a larger one)")
