"""A file of answers that a run adds to line by line, and that the next run goes on from after a kill.

One JSON object per line: for each artifact first what its answers depend on (`identity`), then one line per
question. Knows files and locks; not what an answer is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fox_edge.errors import FoxEdgeError

SCHEMA = 1
_MAX_LINE_BYTES = 4 << 20
# What a line of answers must have, besides what the task adds.
_ARTIFACT, _IDENTITY, _QUESTION = "artifact", "identity", "question"

Fields = dict[str, Any]


class AnswersLog:
    """The answers in a file, held by one run: `with AnswersLog(path) as log`.

    Raises FoxEdgeError for a file that cannot be written, that another run holds, or that is none of ours,
    naming the line. A last line that a kill cut short is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._fd = _open(self.path, os.O_RDWR | os.O_CREAT)
        self._identities: dict[str, Fields] = {}
        self._answers: dict[str, dict[str, Fields]] = {}
        try:
            self._lock()
            for where, line in self._lines():
                self._take(where, line)
        except BaseException:
            os.close(self._fd)
            raise

    def begin(self, artifact: str, identity: Mapping[str, Any]) -> dict[str, Fields]:
        """The answers that an artifact has given already, by question; the file is told of a new artifact.

        Raises FoxEdgeError when those in the file depend on something else, saying on what.
        """
        identity = json.loads(json.dumps(identity))  # as it is read back
        kept = self._identities.get(artifact)
        if kept is None:
            append(self._fd, self.path, {"schema": SCHEMA, _ARTIFACT: artifact, _IDENTITY: identity})
            self._identities[artifact] = dict(identity)
        elif kept != identity:
            differing = [key for key in {**kept, **identity} if kept.get(key) != identity.get(key)]
            was, now = ({key: each.get(key) for key in differing} for each in (kept, identity))
            raise FoxEdgeError(
                f"{self.path}: its answers of {artifact} were given under {_shown(was)}, but this run has "
                f"{_shown(now)}; name another file"
            )
        return dict(self._answers.get(artifact, {}))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FoxEdgeError(f"{self.path}: another run is writing its answers there") from None

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        """(place, line); cuts a last line without an end off the file. A pipe or a device has none."""
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            return
        whole = 0  # bytes of complete lines
        with os.fdopen(os.dup(self._fd), "rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise FoxEdgeError(
                        f"{self.path}, line {number}: longer than {_MAX_LINE_BYTES} bytes, so not an answer"
                    )
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                yield f"{self.path}, line {number}", line
        os.ftruncate(self._fd, whole)

    def _take(self, where: str, line: bytes) -> None:
        """Note what one line says; of two answers to a question the first counts."""
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FoxEdgeError(f"{where}: not JSON ({error}), so not a file of answers") from None
        fields = fields if isinstance(fields, dict) else {}
        artifact = fields.get(_ARTIFACT) if isinstance(fields.get(_ARTIFACT), str) else None
        if artifact is not None and isinstance(fields.get(_IDENTITY), dict):
            if fields.get("schema") != SCHEMA:
                raise FoxEdgeError(
                    f"{where}: schema {fields.get('schema')!r}, but this version reads {SCHEMA}"
                )
            self._identities.setdefault(artifact, fields[_IDENTITY])
        elif artifact is not None and artifact in self._identities and isinstance(fields.get(_QUESTION), str):
            self._answers.setdefault(artifact, {}).setdefault(fields[_QUESTION], fields)
        else:
            raise FoxEdgeError(
                f"{where}: neither an artifact's identity nor an answer of one named before it"
            )

    def __enter__(self) -> AnswersLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def appending(path: Path | None, artifact: str) -> Iterator[Any]:
    """A function (question, fields) that adds an answer to the file, at once; nothing is kept without a file.

    For the process that answers; the lock is its parent's. Raises FoxEdgeError for a full disk.
    """
    if path is None:
        yield lambda question, fields: None
        return
    fd = _open(path, os.O_WRONLY)
    try:
        yield lambda question, fields: append(fd, path, {_ARTIFACT: artifact, _QUESTION: question, **fields})
    finally:
        os.close(fd)


def append(fd: int, path: Path, fields: Mapping[str, Any]) -> None:
    """Add one line, whole or not at all; raises FoxEdgeError when there is no room."""
    line = json.dumps(fields).encode() + b"\n"
    end = os.fstat(fd).st_size
    written = 0
    try:
        while written < len(line):
            written += os.write(fd, line[written:])
    except OSError as error:
        if written:
            os.ftruncate(fd, end)
        raise FoxEdgeError(f"{path}: cannot be written ({error.strerror})") from None


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise FoxEdgeError(f"{path}: cannot be written ({error.strerror})") from None


def _shown(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in fields.items())


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
