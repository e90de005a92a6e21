"""Stands in for CUDA graphs: what was recorded is run again, over what the recorded run left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtimes.cuda.graphs import Graphs


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.replays = 0
        self.work: Callable[[], Any] = lambda: pytest.fail("nothing was recorded")
        self.result: Any = None

    def pool(self) -> str:
        return "a pool"

    def replay(self) -> None:
        self.replays += 1
        for held, new in zip(_tensors(self.result), _tensors(self.work()), strict=True):
            held.copy_(new)


class Recorder:
    """What was run, recorded and replayed by `graphs`, which believe that they are on a GPU."""

    def __init__(self, graphs: Graphs, patch: pytest.MonkeyPatch) -> None:
        self.graphs: list[Graph] = []
        self.pools: list[Any] = []
        self.runs: list[str] = []
        self._recording: Graph | None = None
        stream = SimpleNamespace(wait_stream=lambda other: None)
        patch.setattr(torch.cuda, "Stream", lambda device: stream)
        patch.setattr(torch.cuda, "current_stream", lambda device: stream)
        patch.setattr(torch.cuda, "stream", lambda one: contextlib.nullcontext())
        patch.setattr(torch.cuda, "CUDAGraph", self._graph)
        patch.setattr(torch.cuda, "graph", self._record)
        patch.setattr(graphs, "_device", SimpleNamespace(type="cuda"))

    def watch(self, owner: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        """Take note whenever this method of an object runs, and what it left while something is recorded."""
        real = getattr(owner, name)

        def work(*given: Any) -> Any:
            found, graph = real(*given), self._recording
            self.runs.append("run" if graph is None else "recorded")
            if graph is not None:
                graph.work, graph.result = (lambda: real(*given)), found
            return found

        patch.setattr(owner, name, work)

    def _graph(self) -> Graph:
        self.graphs.append(Graph())
        return self.graphs[-1]

    @contextlib.contextmanager
    def _record(self, graph: Graph, pool: Any, capture_error_mode: str) -> Iterator[None]:
        self.pools.append(pool)
        self._recording = graph
        yield
        self._recording = None


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)
