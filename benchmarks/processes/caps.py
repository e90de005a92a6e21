"""A cap on what a process may hold in memory, enforced from outside on one that runs.

What counts is resident memory: what the process allocated and touched, and the pages of mapped files that it
reads, which is where weights are. A system could drop such pages and read them again, but a model whose
weights do not stay in memory waits for its disk at every token; so they count, here as in the sum that is
made before a run (devices/fit.py).

Two ways, always the second, and the first too where it can be had:

- a control group of version 2 with `memory.max`: the system itself never gives the process more;
- watching the most that the process ever held (`VmHWM`, or what `ps` tells) every few milliseconds, and
  ending it once that is above the cap. So that one huge allocation cannot take the machine down between two
  looks, the process's data (RLIMIT_DATA) are limited to twice the cap and a bit: asking for more fails.

Knows processes and the system's limits; not what is run, nor why it is capped.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

_LOOK_S = 0.01
_PS_LOOK_S = 0.05
_LEAVE_S = 5
# Address space is reserved more than it is used, by thread stacks and by libraries that map ahead.
_DATA_FACTOR, _DATA_MORE = 2, 1 << 30
_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")

WATCHED = "watched, and ended above the cap"
GROUPED = "a control group's memory.max, and watched"


class Guard:
    """A context manager around a running process that may hold at most `cap_bytes`.

    Enter it before the process is given anything to do. Afterwards `exceeded` tells whether the process held
    more, `peak_bytes` the most that was seen, `way` how the cap was enforced.
    """

    def __init__(self, process: subprocess.Popen[str], cap_bytes: int) -> None:
        self.cap_bytes = cap_bytes
        self.peak_bytes = 0
        self.exceeded = False
        self.way = WATCHED
        self._process = process
        self._group: Path | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Guard:
        limit_data(self._process.pid, _DATA_FACTOR * self.cap_bytes + _DATA_MORE)
        self._group = group_of(self._process.pid, self.cap_bytes)
        if self._group is not None:
            self.way = GROUPED
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """To be left when the process has ended, or is to end: what keeps on running loses its cap."""
        self._over.set()
        self._thread.join()
        if self._group is not None:
            self.exceeded = self.exceeded or _killed_in(self._group)
            # A group goes only when nobody is left in it.
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._process.wait(timeout=_LEAVE_S)
                self._group.rmdir()

    def sentence(self) -> str:
        """What is told of a process that held more than the cap."""
        held = max(self.peak_bytes, self.cap_bytes) if self._group else self.peak_bytes
        return (
            f"the process was ended at its memory cap: it held {_mb(held)}, "
            f"the cap is {_mb(self.cap_bytes)} ({self.way})"
        )

    def remark(self) -> str:
        """What is added to how a process ended that never held more than the cap."""
        return f"it held {_mb(self.peak_bytes)} under a cap of {_mb(self.cap_bytes)}"

    def _watch(self) -> None:
        pause = _LOOK_S if sys.platform == "linux" else _PS_LOOK_S
        while not self._over.wait(pause):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, most_held_bytes(self._process.pid) or 0)
        if self.peak_bytes > self.cap_bytes and not self.exceeded:
            self.exceeded = True
            self._process.kill()


def way() -> str:
    """How a cap is kept on this system: tried on a process that does nothing."""
    with subprocess.Popen([sys.executable, "-c", ""], text=True) as process, Guard(process, 1 << 30) as guard:
        process.wait()
    return guard.way


def most_held_bytes(pid: int) -> int | None:
    """The most resident memory that a process had, bytes; where only `ps` tells, what it has now.

    None for a process that has ended.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
            found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
            return int(found[1]) * 1024 if found else None
        return None
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return int(done.stdout) * 1024 if done.stdout.strip().isdigit() else None


def limit_data(pid: int, size_bytes: int) -> None:
    """Let a process's private memory not grow above this, where the system counts it (Linux)."""
    if sys.platform == "linux":
        import resource

        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, resource.RLIMIT_DATA, (size_bytes, size_bytes))


def group_of(pid: int, cap_bytes: int, groups: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> Path | None:
    """Put a process into a control group of its own with this cap; None where this process may not.

    The new group lies in this process's own or beside it: a group that holds processes may have no children
    with limits, but its parent may, as it does in a desktop's sessions. Nothing else is changed.
    """
    with contextlib.suppress(OSError):
        lines = membership.read_text(encoding="utf-8").splitlines()
        path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
        if path is None:
            return None
        own = groups / path.strip("/")
        for parent in (own, own.parent) if own != groups else (own,):
            group = parent / f"fox-edge-{os.getpid()}-{pid}"
            if "memory" in _words(parent / "cgroup.subtree_control") and _make(group, pid, cap_bytes):
                return group
    return None


def _make(group: Path, pid: int, cap_bytes: int) -> bool:
    """Make the group, set its limit, and move the process in; leaves nothing behind where that fails."""
    try:
        group.mkdir()
    except OSError:
        return False
    try:
        (group / "memory.max").write_text(str(cap_bytes))
        with contextlib.suppress(OSError):  # a kernel without swap has no such file
            (group / "memory.swap.max").write_text("0")
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        return False
    return True


def _killed_in(group: Path) -> bool:
    """Whether the system ended a process of the group for its memory."""
    return re.search(r"^oom_kill [1-9]", _text(group / "memory.events"), re.MULTILINE) is not None


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="ascii", errors="replace")
    return ""


def _mb(size_bytes: int) -> str:
    # One decimal, so that a process that was ended right above its cap does not seem to have been at it.
    return f"{size_bytes / 1e6:,.1f} MB"
