"""The two ceilings of a graphics card, measured: bytes per second from its memory, operations per second.

What roofline.py and compute.py do for a processor, timed by the card's own events. One way to read
understates a card, so the best of several counts; products are of random numbers, since zeros run faster.
Runs in a process of its own (the worker's task 'card-rates'), so that nothing stays on the card. Knows
PyTorch and matrices; not models. On the CPU it does the same with the wall clock, for rehearsals.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.devices.compute import BF16, FLOAT32, Compute
from benchmarks.devices.roofline import Bandwidth

CARD_BUFFER_BYTES = 4 << 30
SMALLEST_BUFFER_BYTES = 1 << 20
_COLUMNS = 2048
# (rows, inner, columns): from what a prompt of Fox-1 has to what a card likes best.
SIZES = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192))
_TYPES = {BF16: torch.bfloat16, FLOAT32: torch.float32}
_LEAST_S = 2e-3  # what is timed takes at least so long, so that starting it does not count

Way = Callable[[], object]


def buffer_bytes(working_set_bytes: int, largest: int = CARD_BUFFER_BYTES) -> int:
    """The buffer that stands for a working set: the power of two not above it, from 1 MiB to 4 GiB.

    What fits a card's cache has the cache's ceiling.
    """
    return 1 << (max(SMALLEST_BUFFER_BYTES, min(working_set_bytes, largest)).bit_length() - 1)


def card_bandwidth(size: int = CARD_BUFFER_BYTES, seconds: float = 1.0, device: str = "cuda") -> Bandwidth:
    """Measure how fast a buffer of `size` bytes can be read on a device: the best of several ways."""
    buffer = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_()
    ways, methods = dict(_reading(buffer)), dict[str, float]()
    for name, way in ways.items():
        with contextlib.suppress(RuntimeError):  # a library that does not do it at this size
            methods[name] = size / _best_seconds(way, device, seconds / len(ways))
    method = max(methods, key=lambda name: methods[name])
    return Bandwidth(methods[method], method, size, _threads(device), methods, device)


def card_compute(
    seconds: float = 1.5, device: str = "cuda", sizes: Sequence[tuple[int, int, int]] = SIZES
) -> list[Compute]:
    """The rate of products of random matrices, BF16 and float32, on a device: the best of several sizes."""
    share = seconds / (len(_TYPES) * len(sizes))
    return [_rate(kind, device, sizes, share) for kind in _TYPES]


def run_job(job: dict[str, Any], _progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'card-rates': {sizes, seconds, device?} -> {bandwidth: [...], compute: [...]}."""
    device, seconds = job.get("device", "cuda"), job["seconds"]
    sizes = job.get("products", SIZES)
    return {
        "bandwidth": [card_bandwidth(size, seconds, device).to_json() for size in job["sizes"]],
        "compute": [compute.to_json() for compute in card_compute(seconds, device, sizes)],
    }


def _reading(buffer: Tensor) -> Iterator[tuple[str, Way]]:
    """Name -> what reads the buffer once; a copy writes half as much and reads the other half."""
    floats, half = buffer.view(torch.float32), len(buffer) // 2
    matrix = buffer.view(-1, _COLUMNS)
    vector = torch.ones(_COLUMNS, dtype=buffer.dtype, device=buffer.device)
    yield "sum of float32", partial(torch.sum, floats)
    yield "largest int32", partial(torch.max, buffer.view(torch.int32))
    yield "matrix-vector, BF16", partial(torch.mv, matrix, vector)
    yield "dot product, BF16", partial(torch.dot, buffer[:half], buffer[half:])
    # Last: the first half is overwritten.
    yield "copy, both ways", partial(buffer[:half].copy_, buffer[half:])


def _rate(kind: str, device: str, sizes: Sequence[tuple[int, int, int]], seconds: float) -> Compute:
    methods = {}
    for m, k, n in sizes:
        a, b = (torch.empty(size, dtype=_TYPES[kind], device=device).normal_() for size in ((m, k), (n, k)))
        way = partial(torch.nn.functional.linear, a, b)
        methods[f"{m} x {k} x {n}"] = 2 * m * k * n / _best_seconds(way, device, seconds)
    method = max(methods, key=lambda name: methods[name])
    return Compute(kind, methods[method], method, _threads(device), methods, device)


def _best_seconds(way: Way, device: str, seconds: float) -> float:
    """Seconds of one call in the fastest round of calls within the time given; warmed up first."""
    way()
    once = timed(way, device, 1)
    calls = max(1, round(_LEAST_S / max(once, 1e-7)))
    best, deadline = once, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        best = min(best, timed(way, device, calls) / calls)
    return best


def timed(way: Way, device: str, calls: int) -> float:
    """Seconds that a device works on so many calls, one right after the other."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for _ in range(calls):
            way()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        way()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def _threads(device: str) -> int:
    """What works side by side: a card's multiprocessors."""
    if not device.startswith("cuda"):
        return torch.get_num_threads()
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
