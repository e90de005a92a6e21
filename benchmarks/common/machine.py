"""The machine that numbers come from, and what this process holds in its memory.

Knows the operating system; not models. Imports nothing heavy: versions are read from package metadata.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fox_edge.processors import available_cores

PACKAGES = (
    *("torch", "triton", "numpy", "llama-cpp-python", "gguf", "onnxruntime", "onnxruntime-gpu", "onnx"),
    *("executorch", "torchao", "transformers"),
)


@dataclass(frozen=True)
class Memory:
    """Resident memory of this process, bytes. None where the system does not tell (macOS, for the split).

    `anonymous` is the process's own; `file` are pages of mapped files, which the system may take back.
    """

    rss: int | None
    peak_rss: int
    anonymous: int | None
    file: int | None


def memory() -> Memory:
    """What this process holds now, and held at most."""
    status = _proc_status()
    if status:
        return Memory(
            rss=status.get("VmRSS"),
            # Not getrusage: on Linux a child inherits its parent's peak there.
            peak_rss=status.get("VmHWM", 0),
            anonymous=status.get("RssAnon"),
            file=_sum(status.get("RssFile"), status.get("RssShmem")),
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Memory(None, peak if sys.platform == "darwin" else peak * 1024, None, None)


def peak_rss_bytes() -> int:
    """The most resident memory this process ever had, bytes."""
    return memory().peak_rss


def memory_bytes() -> int:
    """Main memory, bytes: the machine's, cut by a container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first_line(Path("/sys/fs/cgroup/memory.max"))
    return min(total, int(limit)) if limit.isdigit() else total


def available_memory_bytes() -> int:
    """Memory that can be had without driving others out, bytes (half of all where nobody tells)."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    limit = memory_bytes()
    return min(int(found[1]) * 1024, limit) if found else limit // 2


def machine() -> dict[str, Any]:
    """The machine as reports carry it."""
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "memory_bytes": memory_bytes(),
        # The kernel's version without what its builder appended.
        "os": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that make the numbers, of those installed."""
    found = {}
    for package in ("fox-edge", *PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def cpu_name() -> str:
    """The processor's marketing name, or the architecture's where there is none."""
    found = re.search(
        r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE
    )
    if found:
        return found[1].strip()
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=5
            ).stdout.strip()
    return platform.processor() or platform.machine()


def _proc_status() -> dict[str, int]:
    """Fields of /proc/self/status that are sizes, in bytes; empty where there is no such file."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", _text(Path("/proc/self/status")), re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in lines}


def _sum(*values: int | None) -> int | None:
    return None if values[0] is None else sum(v or 0 for v in values)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first_line(path: Path) -> str:
    return _text(path).partition("\n")[0].strip()
