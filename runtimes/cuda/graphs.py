"""CUDA graphs: work of fixed shapes, at fixed places, that a GPU repeats without being told piece by piece.

Launching a kernel takes the host some microseconds, and hundreds of them more than many a pass takes a GPU.
Elsewhere the same work runs piece by piece. Knows nothing of what the work is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# Runs before a graph is recorded: kernels are compiled and libraries set up in the first.
_WARM_UPS = 2


class Graphs:
    """The graphs of one model on one device, by a key of what is done; they share intermediate results.

    Work is over before the next begins, whatever it is, so only results, which are held here, keep memory of
    their own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._seen: set[Hashable] = set()
        self._pool: Any = None

    def run(
        self,
        key: Hashable,
        work: Callable[[], Result],
        *,
        prepare: Callable[[], None] = lambda: None,
        at_once: bool = True,
    ) -> Result:
        """What `work` gives; on a GPU it lies, for one key, always at the same place.

        Work must be the same for one key, find what it takes in and leaves at fixed places, and look at no
        value on the host. It is recorded when the key first comes, or (not `at_once`) when it comes a second
        time: what comes only once costs no recording. `prepare` is called before that.
        """
        if self._device.type != "cuda":
            return work()
        if key not in self._known:
            if not at_once and key not in self._seen:
                self._seen.add(key)
                return work()
            prepare()
            self._known[key] = self._record(work)
        graph, result = self._known[key]
        graph.replay()
        return result

    def _record(self, work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Run it to warm up, then record; what it writes, the first replay writes again."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        self._pool = self._pool or graph.pool()
        return graph, result
