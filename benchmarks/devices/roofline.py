"""The ceiling of decoding one token at a time: how fast memory can be read here.

Knows memory; not models, files or runtimes. One way to read understates a machine (another
library then seems to pass 100 %), so the bandwidth is the best of several ways.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.common.machine import available_memory_bytes
from fox_edge.processors import available_cores

LARGEST_BUFFER_BYTES = 1 << 30
_SMALLEST_BUFFER_BYTES = 1 << 20
_MATRIX_COLUMNS = 1024
_PASS_BYTES = 64 << 20  # read in one timed pass at least, so that starting threads does not count


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second that can be read from a buffer of this size, and by which way."""

    bytes_per_s: float
    method: str
    buffer_bytes: int
    threads: int
    methods: dict[str, float]
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """As reports carry it."""
        return asdict(self)


def buffer_bytes(working_set_bytes: int) -> int:
    """The buffer that stands for a working set: the power of two not above it, from 1 MiB to 1 GiB.

    Less on a small machine. A model that fits a processor's cache has the cache's ceiling, not the memory's.
    """
    limit = min(LARGEST_BUFFER_BYTES, available_memory_bytes() // 8)
    return 1 << (max(_SMALLEST_BUFFER_BYTES, min(working_set_bytes, limit)).bit_length() - 1)


def read_bandwidth(
    size: int = LARGEST_BUFFER_BYTES, threads: int | None = None, seconds: float = 1.0
) -> Bandwidth:
    """Measure how fast a buffer of `size` bytes can be read, with all threads.

    Takes about `seconds` (and as long again to fill a large buffer); best pass of each way, best way of all.
    """
    threads = threads or available_cores()
    # Ones, not zeros: untouched zero pages would all be one physical page.
    buffer = torch.ones(size // 4, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(threads) as pool:
            ways = _ways(buffer, threads, pool)
            methods = {name: _best(way, size, seconds / len(ways)) for name, way in ways.items()}
    finally:
        torch.set_num_threads(before)
    method = max(methods, key=lambda name: methods[name])
    return Bandwidth(methods[method], method, size, threads, methods)


def _ways(buffer: torch.Tensor, threads: int, pool: ThreadPoolExecutor) -> dict[str, Callable[[int], None]]:
    """Name -> a function that reads the whole buffer the given number of times."""
    columns = _MATRIX_COLUMNS
    matrix, vector = buffer.view(-1, columns), torch.ones(columns)
    slices = np.array_split(buffer.numpy().view(np.uint8), threads)
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p

    def each(read: Callable[[np.ndarray], object]) -> Callable[[int], None]:
        def loop(part: np.ndarray, passes: int) -> None:
            for _ in range(passes):
                read(part)

        return lambda passes: [*pool.map(loop, slices, [passes] * threads)].clear()

    def repeat(read: Callable[[], object]) -> Callable[[int], None]:
        return lambda passes: [read() for _ in range(passes)].clear()

    return {
        "torch sum": repeat(lambda: torch.sum(buffer)),
        "torch matrix-vector": repeat(lambda: torch.mv(matrix, vector)),
        "numpy int8 maximum": each(np.max),
        # No byte of 1.0f is 1, so memchr runs through to the end.
        "memchr": each(lambda part: memchr(part.ctypes.data, 1, part.size)),
    }


def _best(way: Callable[[int], None], size: int, seconds: float) -> float:
    """Bytes per second of the fastest pass within the time given."""
    passes = max(1, _PASS_BYTES // size)
    way(passes)  # warm-up
    best, deadline = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        way(passes)
        end = time.perf_counter()
        best = max(best, passes * size / (end - start))
        if end > deadline:
            return best
