"""Compensated rounding: by hand, against a plain-numpy reading of the paper, and by what it is for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from export.blockwise import quantize_compensated
from export.compensate import FLOOR, Compensation, gram, importance
from fox_edge.blockwise import dequantize, quantize, search, unpack
from fox_edge.errors import RecipeError
from fox_edge.quant import ONNX, TYPES, QuantType

NARROW = [t for (format, _), t in TYPES.items() if format == ONNX and t.is_narrow]
by_name = pytest.mark.parametrize("type_", NARROW, ids=lambda t: t.name)


def activations(columns: int, seed: int = 0, tokens: int = 2000) -> torch.Tensor:
    """(N, C), correlated as a network's are: few directions carry most, columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    sizes = torch.rand(columns, generator=generator) + 0.1
    few = torch.randn(tokens, columns // 4, generator=generator)
    noise = torch.randn(tokens, columns, generator=generator)
    return (few @ mixing / columns**0.5 + 0.3 * noise) * sizes


def weights(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))


@pytest.mark.parametrize("columns", [8, 512, 700])
def test_the_gram_matrix(columns: int) -> None:
    x = activations(columns, tokens=50)
    torch.testing.assert_close(gram(x), x.T @ x, rtol=1e-4, atol=1e-4)


def test_importance_is_relative_and_never_zero() -> None:
    got = importance(torch.tensor([0.0, 1.0, 3.0, 4.0]))
    assert got.tolist() == pytest.approx([FLOOR, 0.5, 1.5, 2.0])
    assert importance(torch.zeros(3)).tolist() == pytest.approx([FLOOR] * 3)


def test_an_error_is_made_good_by_a_twin_column() -> None:
    # Columns 0 and 1 always read the same value: only the sum of their weights matters. Steps of 1 round
    # 3.4 down to 3; its twin, 2.3, takes the 0.4 over, 2.7, and becomes 3 instead of 2.
    type_ = TYPES[ONNX, "q4s16"]
    row = torch.tensor([[3.4, 2.3, 8.0] + [0.0] * 13])
    x = torch.zeros(1000, 16)
    x[:, 0] = x[:, 1] = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1.001  # goes first
    x[:, 2:] = 1e-3 * torch.randn(1000, 14, generator=torch.Generator().manual_seed(1))
    x[:, 2] = 0
    guide = Compensation.of(gram(x), damping=1e-4)
    assert guide.order[:2].tolist() == [0, 1]
    guide = dataclasses.replace(
        guide, importance=torch.tensor([1e-6, 1e-6, 1.0] + [0.0] * 13)
    )  # the step stays 1
    got = quantize_compensated(row, type_, guide)
    restored = dequantize(got, type_)[0]
    assert dequantize(quantize(row, type_), type_)[0, :3].tolist() == [3, 2, 8]
    assert unpack(got.packed, 4)[0, 0, :3].tolist() == [8 - 3, 8 - 3, 0]
    # Six steps then stand for 5.7, the sum that is read: the scale moves there, since little holds it.
    assert float(restored[0] + restored[1]) == pytest.approx(5.7, abs=0.02)


def by_the_paper(rows: np.ndarray, H: np.ndarray, type_: QuantType, guide: Compensation) -> np.ndarray:
    """Optimal brain quantization with a fixed order: after each column the inverse of H loses it."""
    grid = search(torch.from_numpy(rows).reshape(len(rows), -1, type_.block_size), type_, guide.importance)
    scales, zeros = grid.scales.double().numpy(), grid.zeros.double().numpy()
    w, inverse = rows.astype(np.float64), np.linalg.inv(H)
    integers = np.zeros(rows.shape, np.int64)
    for j in guide.order.tolist():
        b = j // type_.block_size
        q = np.clip(np.round(w[:, j] / scales[:, b] + zeros[:, b]), 0, 2**type_.bits - 1)
        integers[:, j] = q
        error = w[:, j] - (q - zeros[:, b]) * scales[:, b]
        w -= np.outer(error / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return integers


@by_name
def test_it_is_what_the_paper_says(type_: QuantType) -> None:
    columns = 2 * type_.block_size
    x, rows = activations(columns), weights(12, columns)
    G = gram(x)
    guide = Compensation.of(G.clone(), damping=0.01)
    H = (G / G.diagonal().mean()).double().numpy() + 0.01 * np.eye(columns)
    want = by_the_paper(rows.numpy(), H, type_, guide)
    got = unpack(quantize_compensated(rows, type_, guide).packed, type_.bits).reshape(12, columns)
    # Float32 against float64: a weight in the middle between two integers may fall to the other side, and
    # what it leaves to others then differs too.
    assert (got.numpy() == want).mean() > 0.99


@by_name
def test_the_product_with_the_input_changes_less(type_: QuantType) -> None:
    columns = 2 * type_.block_size
    x, rows = activations(columns), weights(64, columns)
    guide, fresh = Compensation.of(gram(x)), activations(columns, seed=0, tokens=3000)[2000:]

    def loss(blocks) -> float:
        return float((fresh @ (dequantize(blocks, type_) - rows).T).square().mean())

    nearest, searched = loss(quantize(rows, type_)), loss(quantize(rows, type_, guide.importance))
    compensated = loss(quantize_compensated(rows, type_, guide))
    assert searched < nearest and compensated < 0.8 * searched


@by_name
def test_no_other_scales_fit_better(type_: QuantType) -> None:
    columns = 4 * type_.block_size
    x, rows = activations(columns, tokens=4000), weights(8, columns)
    guide = Compensation.of(gram(x))
    got = quantize_compensated(rows, type_, guide)

    def losses(scales: torch.Tensor) -> torch.Tensor:
        difference = dequantize(got._replace(scales=scales), type_) - rows
        return ((difference @ guide.gram) * difference).sum(-1)

    best = losses(got.scales)
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        moved = got.scales * (1 + 0.01 * torch.randn(got.scales.shape, generator=generator))
        assert (losses(moved) > best).all()


def test_rows_are_independent() -> None:
    type_ = TYPES[ONNX, "q4a32"]
    rows, guide = weights(50, 64), Compensation.of(gram(activations(64)))
    whole, part = quantize_compensated(rows, type_, guide), quantize_compensated(rows[20:30], type_, guide)
    assert torch.equal(whole.packed[20:30], part.packed)
    torch.testing.assert_close(whole.scales[20:30], part.scales)


@pytest.mark.parametrize("kind", ["silent", "dead columns", "one token"])
def test_poor_activations_do_no_harm(kind: str) -> None:
    type_, x = TYPES[ONNX, "q4a32"], activations(64)
    if kind == "silent":
        x = torch.zeros_like(x)
    elif kind == "dead columns":
        x[:, ::2] = 0
    else:
        x = x[:1]
    rows = weights(16, 64)
    restored = dequantize(quantize_compensated(rows, type_, Compensation.of(gram(x))), type_)
    assert torch.isfinite(restored).all()
    assert (restored - rows).square().mean() < 0.05 * rows.square().mean()


def test_a_row_of_broken_blocks_is_refused() -> None:
    guide = Compensation.of(torch.eye(40))
    with pytest.raises(RecipeError, match="40 weights is not a whole number of q4a32 blocks of 32"):
        quantize_compensated(torch.zeros(2, 40), TYPES[ONNX, "q4a32"], guide)
