"""A process on a pseudo-terminal: what a user types, and everything that they see."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Mapping, Sequence

_DEADLINE_S = 60.0


class PseudoTerminal:
    """Runs a command on a terminal of its own. Waits are for text, with a deadline; there are no sleeps."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            # Wide, so that no line is wrapped or scrolled: (rows, columns, 0, 0).
            # Whoever runs the tests in the background may ignore what no terminal's processes ignore.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 400, 0, 0))
            os.execve(command[0], list(command), dict(env))
        self._seen = b""
        self._read = 0  # up to where `expect` has looked

    def expect(self, text: str) -> None:
        """Wait until this text has come after the last text that was waited for."""
        wanted = text.encode()
        end = time.monotonic() + _DEADLINE_S
        while (at := self._seen.find(wanted, self._read)) < 0:
            left = end - time.monotonic()
            if left <= 0 or not self._more(left):
                raise AssertionError(f"waited in vain for {text!r}; there was:\n{self.transcript}")
        self._read = at + len(wanted)

    def send(self, text: str) -> None:
        """Type."""
        os.write(self._file, text.encode())

    def interrupt(self, text: str) -> None:
        """Type Ctrl-C and wait for this text; the process must have a handler for SIGUSR1.

        A signal that comes just before a process waits for input is seen only when the next one comes.
        """
        self.send("\x03")
        end = time.monotonic() + _DEADLINE_S
        while text.encode() not in self._seen[self._read :] and time.monotonic() < end:
            os.kill(self._pid, signal.SIGUSR1)
            self._more(0.05)
        self.expect(text)

    def answer(self, prompt: str, text: str) -> None:
        """Type a line when the prompt is there."""
        self.expect(prompt)
        self.send(text + "\n")

    def finish(self) -> int:
        """Wait for the process's end; its exit status."""
        end = time.monotonic() + _DEADLINE_S
        while self._more(max(0.0, end - time.monotonic())):
            pass
        os.close(self._file)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    @property
    def transcript(self) -> str:
        """All that was on the screen, what was typed included."""
        return self._seen.decode(errors="replace").replace("\r\n", "\n").replace("\r", "")

    def _more(self, seconds: float) -> bool:
        """Read what there is; False at the end, or when nothing comes in time."""
        if not select.select([self._file], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._file, 1 << 16)
        except OSError:  # Linux says so when the other side is closed
            return False
        self._seen += data
        return bool(data)
