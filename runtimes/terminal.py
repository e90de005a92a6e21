"""The drawing of a chat in a terminal: prompt, streamed answer, a few commands.

Knows stdin and stdout. The conversation itself is chat.py's; the model is whatever session it got.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from fox_edge.artifact import Artifact
from fox_edge.errors import ContextOverflowError
from fox_edge.progress import say
from fox_edge.tokenizer import Tokenizer
from runtimes.base import FOREIGN_ONNX, SessionOptions, open_session, runtime_name
from runtimes.chat import Chat
from runtimes.generate import Sampling

if TYPE_CHECKING:
    from runtimes.onnx_foreign import ForeignOnnx

HELP = "/undo takes back the last question, /reset starts again, /stats shows the speed, /quit leaves"
_PROMPT = "> "


def chat_in_terminal(
    model: Artifact | ForeignOnnx,
    options: SessionOptions,
    sampling: Sampling,
    *,
    system: str | None = None,
    max_tokens: int | None = None,
    question: str | None = None,
) -> None:
    """Open the model and talk until the user leaves; with `question`, answer it and return."""
    tokenizer = Tokenizer.from_folder(model.path if isinstance(model, Artifact) else model.folder)
    with contextlib.closing(open_session(model, options)) as session:
        terminal = Terminal(Chat(session, tokenizer, system, sampling, max_tokens), sys.stdout)
        if question is not None:
            terminal.answer(question)
            return
        say(f"{_title(model)}, {session.context} tokens of context{_doubt(model)}")
        say(HELP)
        terminal.run(_reader())


def _title(model: Artifact | ForeignOnnx) -> str:
    if isinstance(model, Artifact):
        manifest = model.manifest
        return (
            f"{manifest.checkpoint}, {manifest.format} {manifest.quant}, on {runtime_name(manifest.format)}"
        )
    return f"{model.path.name}, onnx {model.quant} by {model.producer}, on {FOREIGN_ONNX[0]}"


def _doubt(model: Artifact | ForeignOnnx) -> str:
    """A remark on a model that nobody has held to its checkpoint."""
    if not isinstance(model, Artifact):
        return "; another tool's export, not verified (fox-edge verify)"
    return "" if (model.manifest.verification or {}).get("passed") else "; this artifact was never verified"


class Terminal:
    """Reads lines, draws answers. `read` returns a line, or raises EOFError at the end of the input."""

    def __init__(self, chat: Chat, out: TextIO) -> None:
        self.chat, self.out = chat, out
        self._stats = "no answer yet"

    def run(self, read: Callable[[], str]) -> None:
        """Talk until /quit or the end of the input. An interrupt stops the answer, not the chat."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._line("")
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self._line(self._command(line))
            elif line:
                try:
                    self.answer(line)
                except ContextOverflowError as error:
                    self._line(f"({error})")

    def answer(self, question: str) -> None:
        """Ask, and draw the answer as it comes."""
        start = time.monotonic()
        first_s: float | None = None
        pieces = self.chat.ask(question)
        try:
            for piece in pieces:
                first_s = time.monotonic() - start if first_s is None else first_s
                self.out.write(piece)
                self.out.flush()
        except KeyboardInterrupt:
            pieces.close()
            self._line(" (stopped)")
            return
        self._line("")
        if self.chat.notice:
            say(f"({self.chat.notice})")
        self._remember(time.monotonic() - start, first_s or 0.0)

    def _remember(self, total_s: float, first_s: float) -> None:
        written = self.chat.session.length - self.chat.prompt_tokens
        rate = written / (total_s - first_s) if total_s > first_s and written > 0 else 0.0
        self._stats = (
            f"{self.chat.prompt_tokens} prompt tokens ({self.chat.reused_tokens} of them from the cache), "
            f"first text after {first_s:.2f} s, {rate:.1f} tokens/s"
        )

    def _command(self, line: str) -> str:
        if line == "/reset":
            self.chat.reset()
            return "(started again)"
        if line == "/undo":
            return "(took back the last question)" if self.chat.undo() else "(nothing to take back)"
        if line == "/stats":
            return f"({self._stats})"
        return f"({HELP})"

    def _line(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()


def _reader() -> Callable[[], str]:
    """Lines from the user; with editing and a history for the session where the terminal has them."""
    if not sys.stdin.isatty():
        return _read_plain
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it is what gives input() line editing
    return lambda: input(_PROMPT)


def _read_plain() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
