"""What is kept beside an artifact to start faster: where, and how a record proves to be whole.

Nothing of it is needed: whatever is missing, stale or damaged is made anew, and an artifact's manifest does
not know of it. Knows folders and small records; not what is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from fox_edge.partial import write_whole

FOLDER = ".fox-edge"
_MAX_RECORD_BYTES = 8 << 20


def cache_folder(artifact: Path) -> Path | None:
    """Where an artifact's files are kept, there or not; None for a link, which may lead anywhere."""
    folder = artifact / FOLDER
    return None if folder.is_symlink() else folder


def key_of(fields: dict[str, Any]) -> str:
    """A short name for everything that something was made for."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def write_record(path: Path, fields: dict[str, Any]) -> None:
    """Write a record whole or not at all; raises OSError."""
    text = json.dumps(fields)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_whole(path, f"{digest}\n{text}\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote; None when it is not there, or not exactly as it was written."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_symlink() or path.stat().st_size > _MAX_RECORD_BYTES:
            return None
        digest, text, end = path.read_text(encoding="utf-8").split("\n")
        if not end and hashlib.sha256(text.encode()).hexdigest() == digest:
            fields = json.loads(text)
            return fields if isinstance(fields, dict) else None
    return None
