"""Starting a worker, listening to it, and telling how it died. Knows processes; not what a job is about."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes.caps import Guard
from fox_edge.errors import FoxEdgeError

WORKER = (sys.executable, "-P", "-m", "benchmarks.processes.worker")
_ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SAID = 4000  # characters of a dead worker's stderr that are looked at


class WorkerError(FoxEdgeError):
    """A worker that gave no result; one sentence says how it ended."""


def run_worker(
    job: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
    command: Sequence[str] = WORKER,
    timeout_s: float | None = None,
    started: Callable[[subprocess.Popen[str]], None] | None = None,
    cap_bytes: int | None = None,
) -> dict[str, Any]:
    """Do a job in a fresh process and return its result; raises WorkerError.

    The process is killed when this call is interrupted, after `timeout_s`, or when it holds more memory than
    `cap_bytes`. `started` is given the process, so that another thread may end it.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )
        if started is not None:
            started(process)
        timer = threading.Timer(timeout_s or 0, process.kill)
        if timeout_s is not None:
            timer.start()
        guard = None if cap_bytes is None else Guard(process, cap_bytes)
        with process, guard or contextlib.nullcontext():
            try:
                message = _converse(process, job, progress)
            except BaseException:
                process.kill()
                raise
            finally:
                timer.cancel()
        if guard is not None and guard.exceeded:
            raise WorkerError(guard.sentence())
        if "result" in message:
            return dict(message["result"])
        if "error" in message:
            raise WorkerError(message["error"])
        remark = "" if guard is None else f"; {guard.remark()}"
        raise WorkerError(_last_words(process.returncode, stderr) + remark)


def die_with_parent() -> None:
    """Let this process, a worker, end with the one that started it, even when that is killed outright."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _converse(
    process: subprocess.Popen[str], job: dict[str, Any], progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Hand the job over and read lines until the process closes its output; the last message that counts."""
    assert process.stdin is not None and process.stdout is not None
    # A process that dies at once breaks the pipe; how it died is told below.
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        json.dump(job, stdin)
    final: dict[str, Any] = {}
    for line in process.stdout:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if "progress" in message and progress is not None:
                progress(*message["progress"])
            elif "progress" not in message:
                final = message
    return final


def _last_words(returncode: int, stderr: Any) -> str:
    """Why there is no result."""
    if returncode < 0:
        name = signal.Signals(-returncode).name if -returncode in set(signal.Signals) else str(-returncode)
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"
    stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, stderr.tell() - _SAID))
    lines = [line for line in stderr.read().splitlines() if line.strip()]
    return f"the process ended with status {returncode}: {lines[-1] if lines else 'it said nothing'}"
