"""Long work that may be cut off: what is done is kept beside the target, and taken up by the same work again.

A journal is a hidden folder beside the artifact to be, with the file that is being filled, the number of the
last finished step, and the tensor that the next step starts from. Knows nothing of what the steps are.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fox_edge.errors import ArtifactError
from fox_edge.folder_lock import lock_folder
from fox_edge.partial import write_whole

_STATE, _LOCK, _TENSOR = "state.json", "lock", "step-{}.npy"
_MAX_STATE_BYTES = 1 << 20


class Journal:
    """A context manager: the folder is locked while it is open, and stays behind when the work was cut off.

    Cut off means interrupted or killed; `done`, or an error, ends it.

    `identity` is everything that the work depends on, as JSON values; a journal of other work is thrown away.
    Raises ArtifactError when another process works on the same target.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any]) -> None:
        self.target, self.folder = target, target.parent / f".{target.name}.unfinished"
        self.identity = json.loads(json.dumps(identity))
        self.file = self.folder / "data"

    def __enter__(self) -> Journal:
        try:
            lock = lock_folder(self.folder, _LOCK)
        except OSError as error:
            raise ArtifactError(f"{self.target}: cannot be written ({error.strerror})") from None
        if lock is None:
            raise ArtifactError(f"{self.target}: another export to it is running")
        self._lock = lock
        self._step, self._tensor = self._read()
        if self._tensor is None:
            self._clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) or not (self.folder / _STATE).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def last(self) -> tuple[int, Tensor | None]:
        """The number of the last finished step and its tensor; (0, None) when there is none."""
        return self._step, self._tensor

    def write(self, step: int, tensor: Tensor) -> None:
        """Note that a step is finished, once everything in `file` is safely on the disk."""
        handle = os.open(self.file, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        name = _TENSOR.format(step)
        with (self.folder / name).open("wb") as file:
            np.save(file, tensor.numpy(), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        state = {"identity": self.identity, "step": step, "tensor": name}
        write_whole(self.folder / _STATE, json.dumps(state))
        for old in self.folder.glob(_TENSOR.format("*")):
            if old.name != name:
                old.unlink()
        self._tensor = None  # it is the caller's now; holding on to it would cost its memory

    def done(self, place: Path) -> None:
        """Move the finished file to its place; the journal is no longer needed."""
        self.file.replace(place)
        self._clear()

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                path.unlink()
        self._step, self._tensor = 0, None

    def _read(self) -> tuple[int, Tensor | None]:
        """What a journal of the same work holds; anything else in the folder counts as nothing."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            path = self.folder / _STATE
            if path.stat().st_size <= _MAX_STATE_BYTES:
                state = json.loads(path.read_text(encoding="utf-8"))
                if state["identity"] == self.identity and self.file.is_file():
                    step = int(state["step"])
                    array = np.load(self.folder / _TENSOR.format(step), allow_pickle=False)
                    return step, torch.from_numpy(array)
        return 0, None
