"""Letting go of the pages of a model's files that were read once, when it opened.

onnxruntime maps what it reads of a model's files and keeps it mapped: scales and zero points of packed
matrices stay in this process's memory, though the packed copies hold them too. The pages are the file's own:
who needs one again finds it in the system's cache. Knows Linux; elsewhere there is nothing to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

_MAPS = Path("/proc/self/smaps")
_MADV_DONTNEED = 4
_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [0-9]+ +(/.*)")


def drop_pages(*paths: Path) -> None:
    """Let go of all pages of these files that are mapped and were never written to."""
    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, size in list(_clean({os.fspath(path.resolve()) for path in paths})):
            madvise(start, size, _MADV_DONTNEED)


def _clean(paths: set[str]) -> Iterator[tuple[int, int]]:
    """Address and size of every mapping of these files that holds nothing but a file's own pages."""
    start, stop, named = 0, 0, False
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if found := _RANGE.fullmatch(line):
            start, stop, named = int(found[1], 16), int(found[2], 16), found[3] in paths
        elif "-" in line.split(" ", 1)[0]:
            named = False
        elif named and line.startswith("Anonymous:") and line.split()[1] == "0":
            yield start, stop - start
