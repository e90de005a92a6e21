"""The checks of kernels pass the plain operations, in small on the CPU, and catch ones that are wrong."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import kernels
from benchmarks.gpu.kernels import FORMS, KERNELS, Setting, check_kernel, make_matrix, relative_error
from benchmarks.gpu.study import KERNELS as NAMES
from fox_edge.config import FoxConfig
from runtimes.cuda import ops

SMALL = FoxConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=384,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_positions=1024,
)


@pytest.fixture
def setting() -> Setting:
    return Setting(SMALL, "cpu", 0.0, torch.Generator().manual_seed(7))


def test_every_operation_is_looked_at() -> None:
    assert set(NAMES) == set(KERNELS) == set(ops.__all__) - {"Dense", "Matrix", "Packed", "tune"}


@pytest.mark.parametrize("name", KERNELS)
def test_the_plain_operations_pass_in_every_form(name: str, setting: Setting) -> None:
    rows = list(check_kernel(name, setting))
    assert all(row["passed"] and 0 <= row["relative_error"] < 1e-2 for row in rows), rows
    assert {row["form"] for row in rows} == ({"bf16"} if name == "attend" else set(FORMS))
    assert all("seconds" not in row for row in rows)


def test_packed_weights_are_what_dequantization_makes_of_them(setting: Setting) -> None:
    for form in FORMS.values():
        matrix, values = make_matrix(setting, form, 48, 256)
        out = torch.empty_like(values)
        torch.testing.assert_close(ops.dequantize(matrix, out), values, rtol=1e-6, atol=1e-7)
        assert 0.02 < values.std() < 0.2  # about 1 over the root of 256
        assert (matrix.rows, matrix.columns) == (48, 256)


@pytest.mark.parametrize("name", ["norm_linear", "norm_gate_up", "head", "dequantize", "embed"])
def test_a_result_that_is_a_little_wrong_fails(
    name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *inputs: real(*inputs) * 1.03)
    assert not any(row["passed"] for row in check_kernel(name, setting, ["bf16"], [1]))


def test_a_product_that_is_not_added_fails(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "linear_add", lambda x, matrix, residual: None)
    (row,) = check_kernel("linear_add", setting, ["bf16"], [1])
    assert not row["passed"]


def test_attention_that_writes_elsewhere_or_not_at_all_fails(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ops.attend

    def stray(qkv: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
        out = real(qkv, keys, values, *rest)
        values[0, 0, -1] += 1
        return out

    def forgetful(qkv: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
        return real(qkv, keys.clone(), values.clone(), *rest)

    def nan(*inputs: Any) -> Tensor:
        return real(*inputs) * float("nan")

    for wrong in (stray, forgetful, nan):
        monkeypatch.setattr(ops, "attend", wrong)
        assert not any(row["passed"] for row in check_kernel("attend", setting, users=(1, 3)))


def test_kernels_are_timed_where_there_is_time(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_COLD_BYTES", 1 << 21)
    timed = Setting(SMALL, "cpu", 0.001, setting.generator)
    (row,) = check_kernel("norm_linear", timed, ["int4, blocks of 128"], [1])
    weights = (4 + 4) * 64 * 256
    assert row["bytes"] == weights // 2 + 2 * 4 * weights // 128
    assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["seconds"])


def test_the_relative_error_by_hand() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_on_a_card_all_calls_are_one_graph_that_is_replayed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's stream, graph and events, faked: what runs where, and how often."""
    done: list[str] = []

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            done.append("wait")

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    for name, value in (("Stream", Stream), ("CUDAGraph", Graph), ("current_stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda what: contextlib.nullcontext())
    monkeypatch.setattr(kernels, "timed", lambda way, device, calls: (way(), 0.01 * calls)[1])
    call = kernels.Call(lambda: done.append("run"), torch.empty, 0)  # type: ignore[arg-type, return-value]
    card = Setting(SMALL, "cuda", 1.0, setting.generator)
    assert kernels._seconds([call, call], card) == pytest.approx(0.005)
    # Each once to warm up and once to be captured; then replays alone.
    assert done == ["wait", "run", "run", "wait", "run", "run", *["replay"] * 7]


def test_on_a_card_the_ways_to_run_a_product_are_told(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtimes.cuda import ops_choices, ops_triton

    matrix, _ = make_matrix(setting, FORMS["int4, blocks of 128"], 64, 256)
    first = ops_choices.candidates("head", matrix, 1)[0]
    asked: list[int] = []
    monkeypatch.setattr(ops, "tune", lambda name, matrices, users, dtype: asked.append(users))
    monkeypatch.setattr(ops_triton, "times", lambda *_: {first: 2e-6})
    card = Setting(SMALL, "cuda", 1.0, setting.generator)
    told = kernels._tuned("head", [matrix], 1, card)
    assert told == {"way": str(first), "ways_s": {str(first): 2e-6}} and asked == [1]

    def fails(*_: object) -> None:
        raise RuntimeError("out of resources: shared memory")

    monkeypatch.setattr(ops_triton, "times", fails)
    told = kernels._tuned("head", [matrix], 1, card)
    assert told["ways_failed"] == "RuntimeError: out of resources: shared memory"
    assert kernels._tuned("head", [matrix], 1, setting) == {}  # on the CPU
