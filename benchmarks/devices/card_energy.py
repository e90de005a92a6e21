"""Joules that a graphics card took, by the driver's own counter, else by its power looked at over and over.

Knows NVML's counter and nvidia-smi's samples; not what the card was doing. Reads, and sets nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_SAMPLE_MS = 100
_FIRST_S = 5.0  # until nvidia-smi gives its first sample


class CardEnergy:
    """A meter: `read` twice, and `joules` of the two. None where the card does not tell.

    `close` ends what it started.
    """

    def __init__(self) -> None:
        self._counter = _counter()
        self._samples = None if self._counter is not None else _Samples()

    def read(self) -> float | None:
        """Joules since some moment that is always the same."""
        if self._counter is not None:
            return self._counter.joules()
        assert self._samples is not None
        return self._samples.joules()

    def joules(self, before: float | None, after: float | None) -> float | None:
        """What was taken between two readings."""
        return None if before is None or after is None else after - before

    def close(self) -> None:
        """Stop looking."""
        if self._samples is not None:
            self._samples.close()


class _Counter:
    """NVML's counter of millijoules since the driver was loaded (Volta and later)."""

    def __init__(self, library: Any, card: ctypes.c_void_p) -> None:
        self._library, self._card = library, card

    def joules(self) -> float | None:
        millijoules = ctypes.c_ulonglong()
        status = self._library.nvmlDeviceGetTotalEnergyConsumption(self._card, ctypes.byref(millijoules))
        return None if status else millijoules.value / 1e3


def _counter() -> _Counter | None:
    """The counter of the card that CUDA programs see first; None without NVML, or on a card that has none."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(_LIBRARY)
        card = ctypes.c_void_p()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
        if library.nvmlInit_v2():
            return None
        if first.isdigit():
            missing = library.nvmlDeviceGetHandleByIndex_v2(int(first), ctypes.byref(card))
        else:
            missing = library.nvmlDeviceGetHandleByUUID(first.encode(), ctypes.byref(card))
        if not missing:
            counter = _Counter(library, card)
            return counter if counter.joules() is not None else None
    return None


class _Samples:
    """Watts as nvidia-smi tells them several times a second, summed up over time."""

    def __init__(self, command: Sequence[str] | None = None) -> None:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
        self._command = command or (
            *("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"),
            *("-i", first, "-lms", str(_SAMPLE_MS)),
        )
        self._lock = threading.Lock()
        self._joules, self._watts, self._at = 0.0, 0.0, 0.0
        self._told = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._listen, daemon=True).start()
            self._told.wait(_FIRST_S)

    def joules(self) -> float | None:
        """Up to now, the last sample taken to hold on."""
        if self._process is None or self._process.poll() is not None or not self._at:
            return None
        with self._lock:
            return self._joules + self._watts * (time.monotonic() - self._at)

    def close(self) -> None:
        """End nvidia-smi."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._take(float(line), time.monotonic())
        self._told.set()

    def _take(self, watts: float, now: float) -> None:
        with self._lock:
            if self._at:
                self._joules += self._watts * (now - self._at)
            self._watts, self._at = watts, now
        self._told.set()
