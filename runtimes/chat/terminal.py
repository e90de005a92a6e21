"""The drawing of a chat in a terminal: prompt, streamed answer, remarks.

Knows stdin, stdout and stderr. Answers go to stdout and all else to stderr, so that a chat can be kept with
`> FILE`. The conversation is chat.py's, what commands do commands.py's; the model is whatever session it got.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator
from typing import TextIO

from fox_edge.errors import FoxEdgeError
from fox_edge.progress import Progress
from runtimes.chat.chat import Chat
from runtimes.chat.commands import Commands

HINT = '/help lists the commands, """ holds several lines, Ctrl-C stops an answer, Ctrl-D leaves'
_PROMPT, _MORE_PROMPT, _BLOCK = "> ", "... ", '"""'
_BOLD, _DIM, _PLAIN = "\033[1m", "\033[2m", "\033[0m"
# A model's control characters must not steer the terminal: shown as pictures, all but tab and newline.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)

# Gives a line at a prompt; raises EOFError at the end of the input.
Read = Callable[[str], str]


class Terminal:
    """Reads lines, draws answers and remarks."""

    def __init__(self, chat: Chat, model: str, out: TextIO, err: TextIO) -> None:
        self.chat, self._commands = chat, Commands(chat, model)
        self._out, self._err = out, err
        self._colors = wants_colors(err)

    def run(self, read: Read) -> None:
        """Talk until the user leaves. An interrupt stops the answer; two in a row at the prompt leave."""
        interrupted = False
        while True:
            try:
                text = _read_text(read)
            except EOFError:
                self._err.write("\n")
                return
            except KeyboardInterrupt:
                self._err.write("\n")
                if interrupted:
                    return
                interrupted = True
                self.remark("Ctrl-C again leaves, as Ctrl-D and /quit do")
                continue
            except UnicodeDecodeError as error:
                self.remark(f"that was not {error.encoding} text")
                continue
            interrupted = False
            if text and not self._obey(text):
                return

    def remark(self, text: str) -> None:
        """Something that is not the model's, on stderr; a single line in brackets."""
        text = (text if "\n" in text else f"({text})").translate(_PICTURES)
        self._err.write(f"{_DIM}{text}{_PLAIN}\n" if self._colors else f"{text}\n")
        self._err.flush()

    def _obey(self, text: str) -> bool:
        """Do what a text asks for; False to leave."""
        try:
            if text.startswith("/") and not text.startswith("//"):
                result = self._commands.run(text)
                if result is None:
                    return False
                if isinstance(result, str):
                    self.remark(result)
                else:
                    self._draw(result)
            else:
                self._draw(self.chat.ask(text[1:] if text.startswith("//") else text))
        except FoxEdgeError as error:
            self.remark(str(error))
        except KeyboardInterrupt:
            self.remark("stopped")
        return True

    def _draw(self, pieces: Generator[str]) -> None:
        """Draw an answer as it comes, and say what is to be said about it."""
        reply, turns = self.chat.reply, self.chat.turns
        if reply is not None and reply.left_out:
            oldest = "oldest turn is" if reply.left_out == 1 else f"{reply.left_out} oldest turns are"
            self.remark(
                f"the context of {self.chat.session.context} tokens is full: the {oldest} left out of it"
            )
        screen = self._out.isatty()
        begun = False
        try:
            for piece in pieces:
                self._out.write(piece.translate(_PICTURES) if screen else piece)
                self._out.flush()
                begun = True
        except KeyboardInterrupt:
            pieces.close()
            self._end_line()
            kept = self.chat.turns is not turns
            self.remark(
                "stopped; /more goes on" if kept else "stopped before the answer began; it is not kept"
            )
            return
        except FoxEdgeError:
            if begun:
                self._end_line()
            raise
        self._end_line()
        if reply is not None and reply.finish_reason == "length":
            self.remark(f"cut after {reply.tokens} tokens; /more goes on")
        elif reply is not None and reply.finish_reason == "context":
            self.remark(f"cut: the context of {self.chat.session.context} tokens is full; /more goes on")

    def _end_line(self) -> None:
        self._out.write("\n")
        self._out.flush()


class Reading:
    """Progress on a long prompt, for Chat.progress: a line on stderr that goes when the prompt is read."""

    def __init__(self) -> None:
        self._line: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` tokens are run."""
        self._line = self._line or Progress("reading the prompt")
        self._line.update(done, total)
        if done >= total:
            self._line.__exit__(None, None, None)
            self._line = None


def wants_colors(stream: TextIO) -> bool:
    """Whether remarks may be dimmed: on a terminal that can, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def reader() -> Read:
    """Lines from the terminal; with editing and a history for the session where it has them."""
    if not sys.stdout.isatty():
        return _read_plain
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it is what gives input() line editing
    if not wants_colors(sys.stdout):
        return input
    # readline counts what stands between \001 and \002 as no columns.
    return lambda prompt: input(f"\001{_BOLD}\002{prompt}\001{_PLAIN}\002")


def _read_plain(prompt: str) -> str:
    """A line from the terminal when stdout is not one: the prompt belongs on stderr."""
    sys.stderr.write(prompt)
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _read_text(read: Read) -> str:
    '''A line; or several, from one with """ to the next with """. A pasted text may have lines of its own.'''
    text = read(_PROMPT)
    while text.count(_BLOCK) % 2:
        text += "\n" + read(_MORE_PROMPT)
    plain = text.replace(_BLOCK, "").strip()
    # What stands in a block is no command, whatever it begins with.
    return f"/{plain}" if text.startswith(_BLOCK) and plain.startswith("/") else plain
