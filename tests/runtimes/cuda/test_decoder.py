"""What only a GPU runs, as far as it can be looked at without one: when graphs are recorded and replayed.

The graph is a stand-in that runs the step again and writes over what the recorded one left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from fox_edge.checkpoint import Checkpoint
from runtimes.base import SessionOptions
from runtimes.cuda import graphs, prompts
from runtimes.cuda.decoder import Inputs, size_of
from runtimes.cuda.session import CudaSession
from runtimes.generate import generate
from tests.runtimes.cuda.graph_stand_in import Recorder

IDS = [int(t) for t in np.random.default_rng(3).integers(8, 512, 60)]
CPU = torch.device("cpu")


@pytest.fixture
def session(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaSession]:
    """A session on the CPU whose decoder believes that it is on a GPU."""
    opened = CudaSession(
        tiny, SessionOptions(device="cpu", conversations=3, fixed_batch=False), torch.float32
    )
    made = opened._loaded()._decoder
    recorder = Recorder(made._graphs, monkeypatch)
    recorder.watch(made, "_step", monkeypatch)
    opened.recorder = recorder  # type: ignore[attr-defined]
    opened._loaded().looks_ahead = True
    yield opened
    opened.close()


def test_a_graph_is_recorded_once_for_each_size_when_it_first_comes(session: Any, tiny: Checkpoint) -> None:
    plain = CudaSession(tiny, SessionOptions(device="cpu", conversations=3), torch.float32)
    others, plain_others = [session.another() for _ in range(2)], [plain.another() for _ in range(2)]
    recorder = session.recorder
    assert not recorder.graphs
    for rows in (1, 3, 1, 2, 3):
        ours, theirs = [session, *others][:rows], [plain, *plain_others][:rows]
        tokens = [IDS[rows + one.length] for one in ours]
        got, want = session.step_many(ours, tokens), plain.step_many(theirs, tokens)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert [graph.replays for graph in recorder.graphs] == [2, 2, 1]  # of 1, 4 and 2 rows
    assert recorder.runs == 3 * [*graphs._WARM_UPS * ["run"], "recorded"]
    assert recorder.pools == [None, "a pool", "a pool"]


def test_answers_of_graphs_are_those_of_plain_steps(session: Any, tiny: Checkpoint) -> None:
    """With steps begun ahead: the host reads a token before the next replay writes over it."""
    plain = CudaSession(tiny, SessionOptions(device="cpu", conversations=3), torch.float32)
    want = list(generate(plain, IDS[:20], max_tokens=30))
    assert list(generate(session, IDS[:20], max_tokens=30)) == want
    assert session.recorder.graphs[0].replays == 30


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
