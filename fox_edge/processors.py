"""How many processors there are to use. Knows the operating system, nothing else."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Logical processors that this process may use: its affinity, cut by a container's quota."""
    cores = len(_allowed())
    with contextlib.suppress(OSError):
        quota, period = _CPU_QUOTA.read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once: what matrix kernels like best."""
    siblings = set()
    for cpu in _allowed():
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        with contextlib.suppress(OSError):
            siblings.add(path.read_text(encoding="ascii").strip())
    return min(len(siblings), available_cores()) if siblings else available_cores()


def _allowed() -> set[int]:
    """Numbers of the logical processors that the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
