"""What a sweep has done: one small file per finished step, written whole or not at all.

A folder of OUT/steps/IDENTITY.json, and a lock that only one sweep at a time holds. Knows identities and
results; not what a step does or why.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from fox_edge.errors import FoxEdgeError
from fox_edge.folder_lock import lock_folder
from fox_edge.partial import partial_files

_LOCK, _STEPS = ".lock", "steps"
_MAX_BYTES = 256 << 20


class Store:
    """A context manager: the folder is made, and locked while it is open.

    Raises FoxEdgeError when it cannot be written, or another sweep holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._steps = folder / _STEPS

    def __enter__(self) -> Store:
        try:
            self._steps.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(self.folder, _LOCK)
        except OSError as error:
            raise FoxEdgeError(f"{self.folder}: cannot be written ({error.strerror})") from None
        if lock is None:
            raise FoxEdgeError(f"{self.folder}: another sweep is running in this folder")
        self._lock = lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def read(self, identity: str) -> dict[str, Any] | None:
        """The record of a step, with 'result' or 'error'; None when there is none, or none that is whole."""
        path = self._path(identity)
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if path.stat().st_size <= _MAX_BYTES:
                record = json.loads(path.read_text(encoding="utf-8"))
                if _is_record(record, identity):
                    return dict(record)
        return None

    def write(self, identity: str, outcome: Mapping[str, Any]) -> dict[str, Any]:
        """Keep how a step ended, and return the record; `attempt` counts how often it was done."""
        before = self.read(identity)
        attempt = before["attempt"] + 1 if before and type(before.get("attempt")) is int else 1
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"identity": identity, "attempt": attempt, "finished": finished, **outcome}
        write_json(self._path(identity), record)
        return record

    def _path(self, identity: str) -> Path:
        return self._steps / f"{identity}.json"


def _is_record(record: Any, identity: str) -> bool:
    """Whether this is what `write` wrote for that step."""
    if not isinstance(record, dict) or record.get("identity") != identity:
        return False
    return isinstance(record.get("result"), dict) or isinstance(record.get("error"), str)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file whole or not at all; raises FoxEdgeError."""
    try:
        with partial_files(path) as [partial], partial.open("w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, indent=1)
            file.write("\n")
    except OSError as error:
        raise FoxEdgeError(f"{path}: cannot be written ({error.strerror})") from None
