"""A headless Chromium of our own: started, told what to do over a pipe, looked at, and ended.

Speaks the DevTools protocol over `--remote-debugging-pipe`: JSON, each message ended by a zero byte. No port
is opened, and a browser whose pipe closes ends itself, so none is left behind when this process is killed.
Knows processes and messages; not what a page is about.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fox_edge.errors import FoxEdgeError

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Names the program where it has another name or place.
PROGRAM_VARIABLE = "FOX_EDGE_CHROMIUM"
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-extensions",
    "--disable-component-update",
    "--disable-background-networking",
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--disable-dev-shm-usage",
    "--disable-breakpad",
    "--no-default-browser-check",
    "--no-first-run",
)
# Chromium reads file descriptor 3 and writes 4: put there by a program that then becomes Chromium.
_BECOME = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_LOWEST_FD = 10  # so that neither end of a pipe is 3 or 4 itself
START_S, ANSWER_S, END_S = 60.0, 600.0, 10.0
_SAID = 400  # characters of a dead browser's last line
# Chromium keeps a socket in a folder under TMPDIR and aborts where that has a name of more than 107 bytes.
_LONGEST_TMPDIR = 60


def find_chromium() -> str:
    """The program's path; raises FoxEdgeError, saying how to have one."""
    named = os.environ.get(PROGRAM_VARIABLE)
    found = next(filter(None, map(shutil.which, (named,) if named else PROGRAMS)), None)
    if found is None:
        looked = named or ", ".join(PROGRAMS)
        raise FoxEdgeError(
            f"no Chromium or Chrome was found ({looked}): install one, or name it in {PROGRAM_VARIABLE}"
        )
    return found


def _environment() -> dict[str, str]:
    """This process's, with room for the name of a socket."""
    short = len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_TMPDIR
    return dict(os.environ) if short else {**os.environ, "TMPDIR": "/tmp"}


class Chromium:
    """A browser with one empty page, and a profile that is thrown away."""

    def __init__(self, flags: Sequence[str] = ()) -> None:
        program = find_chromium()
        self._profile = tempfile.TemporaryDirectory(prefix="fox-edge-chromium-", ignore_cleanup_errors=True)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        self._held, self._last = b"", 0
        # Root may not use the sandbox, which needs a user of its own.
        sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", "-c", _BECOME, str(theirs_in), str(theirs_out), program),
                *(*_FLAGS, *sandbox, *flags, f"--user-data-dir={self._profile.name}", "about:blank"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,
            env=_environment(),
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            page = self._call("Target.createTarget", {"url": "about:blank"}, timeout_s=START_S)
            found = self._call("Target.attachToTarget", {"targetId": page["targetId"], "flatten": True})
            self._session: str | None = found["sessionId"]
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The first of its processes; all others are its descendants."""
        return self._process.pid

    def open(self, url: str, timeout_s: float = START_S) -> None:
        """Show a page; returns when its scripts have run. Raises FoxEdgeError where it cannot be shown."""
        self._call("Page.enable", {}, self._session)
        shown = self._call("Page.navigate", {"url": url}, self._session)
        if shown.get("errorText"):
            raise FoxEdgeError(f"the browser cannot show {url}: {shown['errorText']}")
        self._wait("Page.loadEventFired", timeout_s)

    def evaluate(self, expression: str, timeout_s: float = ANSWER_S) -> Any:
        """What a JavaScript expression of the page comes to, promises awaited.

        Raises FoxEdgeError with the message of what the page threw.
        """
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = self._call("Runtime.evaluate", asked, self._session, timeout_s)
        if thrown := answer.get("exceptionDetails"):
            said = thrown.get("exception", {}).get("description") or thrown.get("text", "")
            raise FoxEdgeError(said.partition("\n")[0].removeprefix("Error: "))
        return answer["result"].get("value")

    def close(self) -> None:
        """End it, and everything that it started."""
        with contextlib.suppress(OSError):
            os.close(self._out)  # a browser whose pipe is closed ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        self._said.close()
        self._profile.cleanup()

    def _call(
        self, method: str, params: dict[str, Any], session: str | None = None, timeout_s: float = START_S
    ) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self._out, data) :]
        except OSError:
            raise FoxEdgeError(self._ended()) from None
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self._read(deadline, method)
            if answer.get("id") == self._last:
                break
        if "error" in answer:
            raise FoxEdgeError(f"the browser refused {method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer["result"]
        return result

    def _wait(self, event: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._read(deadline, event).get("method") != event:
            pass

    def _read(self, deadline: float, what: str) -> dict[str, Any]:
        """The next message; raises FoxEdgeError when none comes, the page crashed or the browser ended."""
        while b"\0" not in self._held:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise FoxEdgeError(f"the browser did not answer in time ({what})")
            part = os.read(self._in, 1 << 16)
            if not part:
                raise FoxEdgeError(self._ended())
            self._held += part
        line, _, self._held = self._held.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") in ("Inspector.targetCrashed", "Target.targetCrashed"):
            raise FoxEdgeError("the page's process ended: it may have run out of memory")
        return message

    def _ended(self) -> str:
        """Why there is no browser any more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._said.seek(0)
        lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1][-_SAID:] if lines else "it said nothing"
        return f"the browser ended with status {self._process.returncode}: {last}"


def descendants(pid: int) -> list[int]:
    """A process and all that it started and they started, as far as they live; Linux."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # The second field, a name in brackets, may contain anything.
            parent = int(path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def _pipe() -> tuple[int, int]:
    """Both ends of a pipe, none of them a file descriptor that the browser wants for itself."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _LOWEST_FD) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
