"""What a session will take, told before it is taken: the sum, and the longest context that fits.

Knows how much memory this process may still take, and how to add; not what any runtime needs for what. Every
runtime states its own `MemoryNeed`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fox_edge.errors import NotEnoughMemoryError

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
# The control groups of this process, and where the groups are.
_MEMBERSHIP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
# Files of limit, use and statistics, and how the statistics name pages of files that may be dropped: of
# version 2, then of version 1.
_VERSION_2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a session takes: weights and buffers in any case, and so much per position of context.

    `per_position` is the KV cache's, `scratch_per_position` what attention holds beside it; the cache has
    room for positions in whole steps of `step`.
    """

    weights: int
    buffers: int
    per_position: int
    scratch_per_position: int = 0
    step: int = 1

    def cache(self, positions: int) -> int:
        """Bytes of the KV cache at a context of so many positions."""
        return -(-positions // self.step) * self.step * self.per_position

    def scratch(self, positions: int) -> int:
        """Bytes of all buffers at a context of so many positions."""
        return self.buffers + self.scratch_per_position * positions

    def total(self, positions: int) -> int:
        """Bytes at a context of so many positions."""
        return self.weights + self.scratch(positions) + self.cache(positions)

    def fitting(self, available: int, limit: int) -> int:
        """The longest context, of at most `limit`, that this much memory holds; 0 when none does."""
        each = max(1, self.per_position + self.scratch_per_position)
        steps = (available - self.total(0)) // (each * self.step)
        return max(0, min(limit, steps * self.step))


def available_bytes() -> int | None:
    """Memory that this process can take without anything else going: what the system has left, or what its
    container may still have, whichever is less. None where the system does not tell."""
    return min([*_system(), *_containers()], default=None)


def resident_bytes() -> int:
    """Memory that this process holds, mapped files included; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return sum(_numbers(_STATUS, "VmRSS:", 1024))
    return 0


class Room(NamedTuple):
    """Memory that is left for a session, and a clause that says so: '12 MB of memory are available'."""

    available: int
    words: str


def fitting_context(
    need: MemoryNeed, asked: int | None, limit: int, what: str, room: Room | None = None
) -> int:
    """The context to open: what was asked for, else as much of the model's `limit` as fits in memory.

    `room` is another memory than this process's own. Raises NotEnoughMemoryError with the sum, and what would
    fit, when it does not.
    """
    wanted = limit if asked is None else asked
    room = room or _own_room()
    if room is None or need.total(wanted) <= room.available:
        return wanted
    most = need.fitting(room.available, limit)
    if asked is None and most > 0:
        return most
    fits = f"a context of {most} would fit" if most > 0 else "no context would fit"
    raise NotEnoughMemoryError(
        f"{what}: a context of {wanted} tokens takes {mb(need.weights)} of weights + "
        f"{mb(need.cache(wanted))} of KV cache + {mb(need.scratch(wanted))} of buffers = "
        f"{mb(need.total(wanted))}, but {room.words}; {fits}"
    )


def mb(size: int) -> str:
    """Bytes as a user reads them."""
    return f"{size / 1e6:,.0f} MB"


def _own_room() -> Room | None:
    available = available_bytes()
    return None if available is None else Room(available, f"{mb(available)} of memory are available")


def _system() -> Iterator[int]:
    with contextlib.suppress(OSError):
        yield from _numbers(_MEMINFO, "MemAvailable:", 1024)


def _containers() -> Iterator[int]:
    """What is left of the limit of every control group around this process, where there is one."""
    with contextlib.suppress(OSError):
        for line in _MEMBERSHIP.read_text(encoding="ascii").splitlines():
            number, _, rest = line.partition(":")
            kind, _, path = rest.partition(":")
            if number == "0":
                yield from _left(_GROUPS, path, *_VERSION_2)
            elif kind == "memory":
                yield from _left(_GROUPS / "memory", path, *_VERSION_1)


def _left(root: Path, path: str, most: str, used: str, statistics: str, droppable: str) -> Iterator[int]:
    """Of a group and of those that it is in: the limit, less what is used and cannot be dropped."""
    folder = root / path.strip("/")
    for group in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):
            limit, use = (int((group / name).read_text(encoding="ascii")) for name in (most, used))
            yield max(0, limit - use + sum(_numbers(group / statistics, droppable, 1)))
        if group == root:
            break


def _numbers(path: Path, name: str, unit: int) -> Iterator[int]:
    """The number on the line of a file that begins with `name`."""
    for line in path.read_text(encoding="ascii").splitlines():
        words = line.split()
        if words[:1] == [name]:
            yield unit * int(words[1])
