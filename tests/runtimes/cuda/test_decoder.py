"""What only a GPU runs, as far as it can be looked at without one: when graphs are recorded and replayed.

The graph is a stand-in that runs the step again and writes over what the recorded one left, as a real one
does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from fox_edge.checkpoint import Checkpoint
from runtimes.base import SessionOptions
from runtimes.cuda import decoder, prompts
from runtimes.cuda.decoder import Inputs, Outcome, size_of
from runtimes.cuda.session import CudaSession
from runtimes.generate import generate

IDS = [int(t) for t in np.random.default_rng(3).integers(8, 512, 60)]
CPU = torch.device("cpu")


class Graph:
    """Stands in for torch.cuda.CUDAGraph: what was recorded under it is run again."""

    recorded: ClassVar[list[Graph]] = []

    def __init__(self) -> None:
        self.replays = 0
        self.step: Any = None
        Graph.recorded.append(self)

    def pool(self) -> str:
        return "a pool"

    def replay(self) -> None:
        self.replays += 1
        run, inputs, outcome = self.step
        for held, new in zip(outcome, run(inputs), strict=True):
            held.copy_(new)


@pytest.fixture
def session(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaSession]:
    """A session on the CPU whose decoder believes that it is on a GPU."""
    Graph.recorded.clear()
    opened = CudaSession(
        tiny, SessionOptions(device="cpu", conversations=3, fixed_batch=False), torch.float32
    )
    made = opened._loaded()._decoder
    stream = SimpleNamespace(wait_stream=lambda other: None)
    recording: list[Graph] = []
    pools: list[Any] = []
    steps: list[str] = []
    real = made._step

    def step(inputs: Inputs) -> Outcome:
        steps.append("recorded" if recording else "run")
        found = real(inputs)
        if recording:
            recording[0].step = (real, inputs, found)
        return found

    @contextlib.contextmanager
    def record(graph: Graph, pool: Any, capture_error_mode: str) -> Iterator[None]:
        pools.append(pool)
        recording.append(graph)
        yield
        recording.clear()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda one: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(made, "_step", step)
    monkeypatch.setattr(made, "_inputs", {size: Inputs(size, CPU) for size in (1, 2, 4)})
    monkeypatch.setattr(made, "_device", SimpleNamespace(type="cuda"))
    opened.steps, opened.pools = steps, pools  # type: ignore[attr-defined]
    opened._loaded().looks_ahead = True
    yield opened
    opened.close()


def test_a_graph_is_recorded_once_for_each_size_when_it_first_comes(session: Any, tiny: Checkpoint) -> None:
    plain = CudaSession(tiny, SessionOptions(device="cpu", conversations=3), torch.float32)
    others, plain_others = [session.another() for _ in range(2)], [plain.another() for _ in range(2)]
    assert not Graph.recorded
    for rows in (1, 3, 1, 2, 3):
        ours, theirs = [session, *others][:rows], [plain, *plain_others][:rows]
        tokens = [IDS[rows + one.length] for one in ours]
        got, want = session.step_many(ours, tokens), plain.step_many(theirs, tokens)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert [graph.replays for graph in Graph.recorded] == [2, 2, 1]  # of 1, 4 and 2 rows
    assert session.steps == 3 * [*decoder._WARM_UPS * ["run"], "recorded"]
    assert session.pools == [None, "a pool", "a pool"]


def test_answers_of_graphs_are_those_of_plain_steps(session: Any, tiny: Checkpoint) -> None:
    """With steps begun ahead: the host reads a token before the next replay writes over it."""
    plain = CudaSession(tiny, SessionOptions(device="cpu", conversations=3), torch.float32)
    want = list(generate(plain, IDS[:20], max_tokens=30))
    assert list(generate(session, IDS[:20], max_tokens=30)) == want
    assert Graph.recorded[0].replays == 30


def test_the_next_size_up() -> None:
    assert [size_of(rows) for rows in (1, 2, 3, 5, 33, 64)] == [1, 2, 4, 8, 64, 64]


def test_a_batch_is_filled_up_with_rows_that_write_aside() -> None:
    inputs = Inputs(4, CPU)
    inputs.fill([2, 0], [7, 9], [100, 200], spare=5)
    assert inputs.tokens.tolist() == [100, 200, 0, 0] and inputs.tokens.dtype == torch.int64
    assert inputs.slots.tolist() == [2, 0, 5, 5] and inputs.slots.dtype == torch.int32
    assert inputs.positions.tolist() == [7, 9, 0, 0] and inputs.positions.dtype == torch.int32
    inputs.fill([1], [3], [8], spare=5)
    inputs.advance(torch.tensor([77, 1, 1, 1]), 1)
    assert (inputs.tokens.tolist(), inputs.positions.tolist()) == ([77, 0, 0, 0], [4, 0, 0, 0])
    inputs.advance(torch.tensor([-1, 1, 1, 1]), 1)
    assert inputs.tokens.tolist()[0] == 0


def test_a_gpu_s_attention_sees_what_the_cpu_s_sees() -> None:
    """The bias that picks flash attention, on the CPU, where it becomes a mask."""
    q, k, v = torch.randn(4, 5, 16), torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    bias = causal_lower_right(5, 12)
    got = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias, enable_gqa=True)[0]
    torch.testing.assert_close(got, prompts._attention(q, k, v), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_s_norm_is_the_same(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 64).to(dtype), 1 + torch.randn(64) / 10
    weight = weight.to(dtype).float()
    got = F.rms_norm(x, (64,), weight.to(dtype), 1e-5)
    torch.testing.assert_close(got, prompts._rms_norm(x, weight, 1e-5))
