"""What a session will take, told before it is taken: the sum, and the longest context that fits.

Knows how much memory this process may still take, and how to add; not what any runtime needs for what. Every
runtime states its own `MemoryNeed`.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from fox_edge.errors import NotEnoughMemoryError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# (limit, use, statistics) of a container: version 2 of control groups, then version 1.
_GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a session takes: weights and buffers in any case, and so much per position of context."""

    weights: int
    buffers: int
    per_position: int

    def total(self, positions: int) -> int:
        """Bytes at a context of so many positions."""
        return self.weights + self.buffers + self.per_position * positions


def available_bytes() -> int | None:
    """Memory that this process can take without anything else going: what the system has left, or what its
    container may still have, whichever is less. None where the system does not tell."""
    found = [size for size in (_system(), _container()) if size is not None]
    return min(found, default=None)


def fitting_context(need: MemoryNeed, asked: int | None, limit: int, what: str) -> int:
    """The context to open: what was asked for, else as much of the model's `limit` as fits in memory.

    Raises NotEnoughMemoryError with the sum, and what would fit, when it does not.
    """
    wanted = limit if asked is None else asked
    available = available_bytes()
    if available is None or need.total(wanted) <= available:
        return wanted
    most = min(limit, (available - need.total(0)) // max(1, need.per_position))
    if asked is None and most > 0:
        return most
    fits = f"a context of {most} would fit" if most > 0 else "no context would fit"
    raise NotEnoughMemoryError(
        f"{what}: a context of {wanted} tokens takes {_mb(need.weights)} of weights + "
        f"{_mb(need.per_position * wanted)} of KV cache + {_mb(need.buffers)} of buffers = "
        f"{_mb(need.total(wanted))}, but {_mb(available)} of memory are available; {fits}"
    )


def _system() -> int | None:
    with contextlib.suppress(OSError):
        found = re.search(
            r"^MemAvailable:\s+([0-9]+) kB$", _MEMINFO.read_text(encoding="ascii"), re.MULTILINE
        )
        if found:
            return 1024 * int(found[1])
    return None


def _container() -> int | None:
    """What is left of a container's limit; pages of files that it may drop count as left."""
    for names in _GROUP_FILES:
        with contextlib.suppress(OSError, ValueError):
            limit, used, statistics = ((_CGROUP / name).read_text(encoding="ascii") for name in names)
            droppable = re.search(r"^(?:total_)?inactive_file ([0-9]+)$", statistics, re.MULTILINE)
            return max(0, int(limit) - int(used) + (int(droppable[1]) if droppable else 0))
    return None


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
