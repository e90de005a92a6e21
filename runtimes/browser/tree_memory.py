"""What a tree of processes holds in memory, the shared pages counted once.

A browser is several processes that share most of their program's pages: the sum of their resident sets counts
those several times, the sum of proportional set sizes (PSS, proc_pid_smaps_rollup(5)) once. Linux tells both;
elsewhere nothing is told. Knows processes; not what they run.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

_LOOK_S = 0.25


class Held(NamedTuple):
    """Bytes of memory held: all of it, and by what it is."""

    total: int
    anonymous: int
    file: int


def held(pids: Iterable[int]) -> Held | None:
    """What these processes hold together; None where the system does not tell."""
    found = [one for one in map(_held, pids) if one is not None]
    return Held(*map(sum, zip(*found, strict=True))) if found else None


def _held(pid: int) -> Held | None:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace")
        found = re.findall(r"^(Pss\w*):\s+(\d+) kB", text, re.MULTILINE)
        sizes = {name: int(kib) * 1024 for name, kib in found}
        if "Pss" in sizes:
            shared = sizes.get("Pss_File", 0) + sizes.get("Pss_Shmem", 0)
            return Held(sizes["Pss"], sizes.get("Pss_Anon", 0), shared)
    return None


class Watch:
    """A context manager: looks at a tree every now and then and keeps the most that it held.

    Looking takes a few milliseconds of a processor: not to be done while something is timed.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self.peak_bytes = 0
        self._pids = pids
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def look(self) -> Held | None:
        """What is held now."""
        now = held(self._pids())
        self.peak_bytes = max(self.peak_bytes, 0 if now is None else now.total)
        return now

    def _run(self) -> None:
        while not self._over.wait(_LOOK_S):
            self.look()
