"""The system's page cache before a model is loaded: emptied of its files ("cold"), or filled ("warm").

Knows files and pages; not models. What the system did is looked at (mincore), not taken for granted: it may
keep pages that are asked to go, and it does not tell who may not write a file what of it is cached.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WARM, COLD = "warm", "cold"
STATES = (WARM, COLD)
_PIECE = 1 << 20
# Read ahead and bookkeeping may touch a page here and there.
_NEARLY_NONE, _NEARLY_ALL = 0.01, 0.99


def prepare(state: str, files: Sequence[Path]) -> list[str]:
    """Bring the page cache into a state as far as these files go; what did not succeed, in words."""
    if state == COLD:
        return _cold(files)
    return _warm(files)


def model_files(folder: Path) -> list[Path]:
    """The files in a model's folder and in its own folders, where runtimes keep theirs; links followed."""
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return [path.resolve() for path in sorted(found) if path.is_file()]


def resident_share(files: Sequence[Path]) -> float | None:
    """The share of the files' pages that is in memory, 0 to 1; None where the system does not tell."""
    pages = resident = 0
    for path in files:
        found = _resident(path)
        if found is None:
            return None
        resident += found[0]
        pages += found[1]
    return resident / pages if pages else None


def drop(files: Sequence[Path]) -> bool:
    """Ask the system to let go of the files' pages, written ones after writing them; False: it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with contextlib.suppress(OSError), path.open("rb") as file:
            # Only what is on disk can be dropped.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _cold(files: Sequence[Path]) -> list[str]:
    if not drop(files):
        return ["not cold: this system has no way to drop a file's pages"]
    share = resident_share(files)
    if share is None:
        return ["asked for a cold page cache; the system does not tell whether it is"]
    if share > _NEARLY_NONE:
        return [f"not quite cold: the system kept {100 * share:.0f} % of the files' pages"]
    return []


def _warm(files: Sequence[Path]) -> list[str]:
    share = resident_share(files)
    if share is None or share < _NEARLY_ALL:
        buffer = bytearray(_PIECE)
        for path in files:
            with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        share = resident_share(files)
    if share is not None and share < _NEARLY_ALL:
        return [f"not quite warm: memory holds {100 * share:.0f} % of the files' pages"]
    return []


def _resident(path: Path) -> tuple[int, int] | None:
    """Pages of a file that are in memory, and all its pages; None where nobody tells.

    Mapping a file reads nothing of it. Linux tells the truth to those who may write the file.
    """
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    if mincore is None:
        return None
    try:
        if not (size := path.stat().st_size):
            return 0, 0
        if not os.access(path, os.W_OK):
            return None
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
            pages = -(-size // mmap.PAGESIZE)
            flags = np.zeros(pages, np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            address, table = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(flags.ctypes.data)
            failed = mincore(address, ctypes.c_size_t(size), table)
            del view  # else the mapping cannot be closed
            return None if failed else (int((flags & 1).sum()), pages)
    except (OSError, ValueError):
        return None
