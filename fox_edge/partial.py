"""Folders, files that appear whole or not at all: filled under a hidden name beside the target, then renamed.

Whoever fills a folder holds a lock on it, so that what a killed process left behind is told from what another
is writing now, and is cleared away by the next one that writes to the same target. Files are small and done
at once: of them, what a killed process left stays. Knows nothing of contents.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_PARTIAL, _OLD = ".partial", ".old"


class PartialFolder:
    """A context manager; `path` is to be filled, `put_in_place` renames it to the target.

    Leaving the context without that deletes the folder. Raises OSError when it cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._lock = -1

    def __enter__(self) -> PartialFolder:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        for left in _siblings(self.target, _PARTIAL):
            _remove_abandoned(left)
        if self.target.exists():
            for left in _siblings(self.target, _OLD):
                shutil.rmtree(left, ignore_errors=True)
        while not self._make():
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def put_in_place(self) -> None:
        """Flush everything and rename the folder; an old target steps aside, and comes back on failure."""
        for path in self.path.iterdir():
            flush(path)
        flush(self.path)
        old = None
        if self.target.exists():
            old = _sibling(self.target, _OLD)
            self.target.rename(old)
        try:
            self.path.rename(self.target)
        except OSError:
            if old is not None:
                old.rename(self.target)
            raise
        flush(self.target.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _make(self) -> bool:
        """Make and lock a folder; False when another took it for abandoned before it was locked."""
        self.path = _sibling(self.target, _PARTIAL)
        self.path.mkdir()
        try:
            self._lock = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        if self.path.exists():
            return True
        os.close(self._lock)
        return False


@contextlib.contextmanager
def partial_files(*targets: Path) -> Iterator[list[Path]]:
    """Names to write the targets under; on leaving they are on the disk and renamed, all of them or none.

    Leaving with an exception, or without having written all, deletes what was written, and what the targets
    were stays. Raises OSError.
    """
    partial = [_sibling(target, _PARTIAL) for target in targets]
    try:
        yield partial
        for path in partial:
            _sync(path)
        for path, target in zip(partial, targets, strict=True):
            path.replace(target)
        for folder in {target.parent for target in targets}:
            flush(folder)
    finally:
        for path in partial:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def write_whole(target: Path, text: str) -> None:
    """Write a text file, or leave what is there; raises OSError."""
    with partial_files(target) as [partial]:
        partial.write_text(text, encoding="utf-8")


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}{kind}"


def _siblings(target: Path, kind: str) -> Iterator[Path]:
    """Hidden folders of this target's that are of a kind."""
    for path in list(target.parent.iterdir()):
        if path.name.startswith(f".{target.name}.") and path.name.endswith(kind) and path.is_dir():
            middle = path.name.removeprefix(f".{target.name}.").removesuffix(kind)
            if "." not in middle:  # else it is that of a longer name
                yield path


def _remove_abandoned(folder: Path) -> None:
    """Delete a folder that nobody holds."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def flush(path: Path) -> None:
    """Ask the disk to keep a file or folder; not every file system can flush a folder."""
    with contextlib.suppress(OSError):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
