"""What the user sees on stderr while something takes long. Knows nothing of the work."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_QUIET_S = 2.0  # anything shorter needs no progress
_REDRAW_S = 0.2


def say(line: str) -> None:
    """One line to stderr."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """One line on stderr, redrawn on a terminal, printed at quarters elsewhere; silent for short work."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = self._drawn = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._quarter = 0
        self._shown = False

    def update(self, done: int, total: int) -> None:
        """Tell how far the work is; `done` and `total` in any unit."""
        now = time.monotonic()
        if now - self._start < _QUIET_S or total <= 0:
            return
        share = min(done / total, 1.0)
        left_s = (now - self._start) * (1 - share) / share if share > 0 else 0.0
        line = f"{self._label}: {share:4.0%}, {left_s:.0f} s left"
        if self._terminal and now - self._drawn >= _REDRAW_S:
            self._drawn, self._shown = now, True
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        elif not self._terminal and int(share * 4) > self._quarter:
            self._quarter = int(share * 4)
            say(line)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
