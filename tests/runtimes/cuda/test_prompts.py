"""Short prompts, filled up as on a GPU: against the reference model, called once on everything."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fox_edge.checkpoint import Checkpoint
from runtimes.base import SessionOptions
from runtimes.cuda import prompts
from runtimes.cuda.graphs import _WARM_UPS
from runtimes.cuda.prompts import LENGTHS, REACHES, _attention, _biased_attention, filled_up
from runtimes.cuda.session import CudaSession
from tests.runtimes.cuda.graph_stand_in import Recorder

IDS = [int(t) for t in np.random.default_rng(3).integers(8, 512, 240)]


@pytest.fixture(scope="module", params=["tiny", "tiny_256"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    found: Checkpoint = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def want(checkpoint: Checkpoint) -> np.ndarray:
    with torch.inference_mode():
        return checkpoint.load_model()(torch.tensor([IDS]))[0].numpy()


@pytest.fixture
def session(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaSession]:
    monkeypatch.setattr(prompts, "fills_up", lambda device: True)
    monkeypatch.setattr(prompts, "REACHES", (48, 160, 512))
    opened = CudaSession(
        checkpoint, SessionOptions(device="cpu", conversations=3, context=240), torch.float32
    )
    yield opened
    opened.close()


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_a_prompt_is_filled_up_to_the_next_length_that_fits() -> None:
    assert filled_up(2, 0, 8192) == (16, 0)
    assert filled_up(17, 0, 8192) == (32, 0)
    assert filled_up(384, 0, 8192) == (384, 0)
    assert filled_up(385, 0, 8192) is None
    # After others it looks at as many positions as there is a graph for.
    assert filled_up(100, 1, 8192) == (128, 256)
    assert filled_up(100, 128, 8192) == (128, 256)
    assert filled_up(100, 129, 8192) == (128, 512)
    assert filled_up(100, 1920, 8192) == (128, 2048)
    assert filled_up(100, 1921, 8192) is None
    # What fills it up must lie in the slot too, and a reach is never more than the slot.
    assert filled_up(100, 0, 127) is None
    assert filled_up(100, 500, 700) == (128, 700)
    assert filled_up(100, 573, 700) is None
    assert tuple(sorted(LENGTHS)) == LENGTHS and tuple(sorted(REACHES)) == REACHES


def test_prompts_of_every_kind_are_the_reference_s(session: CudaSession, want: np.ndarray) -> None:
    at = 0
    for count in (5, 16, 20, 2, 100, 64):  # at the start, at once to the end of a length, after others
        assert relative(session.prefill(IDS[at : at + count]), want[at + count - 1]) < 1e-5
        at += count
        assert relative(session.step(IDS[at]), want[at]) < 1e-5  # writes over what filled it up
        at += 1
    assert filled_up(240 - at, at, session.context) is None  # the slot ends before the length does
    assert relative(session.prefill(IDS[at:]), want[-1]) < 1e-5


def test_score_and_truncation_after_a_filled_prompt(session: CudaSession, want: np.ndarray) -> None:
    session.prefill(IDS[:40])
    session.truncate(7)
    rows = np.concatenate(list(session.score(IDS[7:60], start=3)))
    assert relative(rows, want[10:60]) < 1e-5


def test_what_fills_a_prompt_up_touches_no_other_slot(session: CudaSession) -> None:
    slots = session._loaded().slots
    other = session.another()
    other.prefill(IDS[100:200])
    before = slots.keys[:, other._slot].clone(), slots.values[:, other._slot].clone()
    session.prefill(IDS[:17])
    session.prefill(IDS[17:80])
    assert torch.equal(before[0], slots.keys[:, other._slot])
    assert torch.equal(before[1], slots.values[:, other._slot])
    other.close()


def test_a_length_is_recorded_when_it_comes_again_and_says_the_same(
    session: CudaSession, want: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = session._loaded()._prompts
    recorder = Recorder(made._graphs, monkeypatch)
    recorder.watch(made, "_filled", monkeypatch)
    found = []
    for _ in range(4):
        session.reset()
        found.append((session.prefill(IDS[:30]), session.prefill(IDS[30:60])))
    # Once plainly; then to warm up, recorded and replayed; from there on replayed: 32 at the start, 32 after.
    assert recorder.runs == ["run"] * 2 + 2 * [*["run"] * _WARM_UPS, "recorded"]
    assert [graph.replays for graph in recorder.graphs] == [3, 3]
    for first, second in found:
        assert relative(first, want[29]) < 1e-5 and relative(second, want[59]) < 1e-5
        assert np.array_equal(first, found[0][0]) and np.array_equal(second, found[0][1])  # bit by bit
    # Other tokens, another length of the same graph: what lies in the inputs is what counts.
    session.reset()
    assert relative(session.prefill(IDS[:25]), want[24]) < 1e-5
    assert recorder.graphs[0].replays == 4


def test_attention_with_a_bias_is_attention() -> None:
    q, k, v = torch.randn(6, 5, 16), torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    wider = [torch.cat([x, torch.randn(2, 4, 16)], dim=1) for x in (k, v)]  # behind the end: not looked at
    seen = torch.arange(16) <= torch.arange(7, 12)[:, None]
    bias = torch.zeros(5, 16).masked_fill_(~seen, -torch.inf)
    torch.testing.assert_close(_biased_attention(q, *wider, bias), _attention(q, k, v), atol=1e-6, rtol=1e-5)
