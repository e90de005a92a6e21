"""The peak of a process's own memory, which systems do not keep: sampled from the side."""

from __future__ import annotations

import threading
from types import TracebackType

from benchmarks.common.machine import memory

_SAMPLE_S = 0.02


class AnonymousPeak:
    """A context manager; `bytes` is the most anonymous memory seen so far (0 where the system does not tell).

    Memory-mapped files are not in it: the system takes their pages back whenever it needs them.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.look()

    def look(self) -> int:
        """Take a sample now; returns the peak so far."""
        self.bytes = max(self.bytes, memory().anonymous or 0)
        return self.bytes

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
