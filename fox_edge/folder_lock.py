"""A folder that one process at a time works in. Knows locks; not what the work is."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_LOCK_MODE = 0o600


def lock_folder(folder: Path, name: str) -> int | None:
    """Make a folder and hold its file `name`: a descriptor, to be closed when done; None: another holds it.

    The lock ends with this process, however that ends, since children do not inherit it (PEP 446). Raises
    OSError when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, _LOCK_MODE)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
