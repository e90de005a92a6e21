"""Rows as XNNPACK's kernels read them: what is written is what was chosen, and scales are what it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from export.compensate import Compensation
from export.pte_weights import as_stored, round_rows
from fox_edge.blockwise import dequantize
from fox_edge.quant import PTE, TYPES, WHOLE_ROW, QuantType

COLUMNS = 128


def rows(count: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(seed))


def type_of(name: str) -> QuantType:
    return TYPES[PTE, name].of_row(COLUMNS)


def decoded(packed: Tensor, scales: Tensor, type_: QuantType) -> Tensor:
    """The layout as docs/pte.md tells it, written down again."""
    if type_.bits == 4:
        pairs = torch.stack((packed & 15, packed >> 4), -1).flatten(1).float() - 8
    else:
        pairs = packed.view(torch.int8).flatten(1).float()
    return pairs * scales.repeat_interleave(type_.block_size, 1)


@pytest.mark.parametrize("name", ["q4s32", "q4s64", "q4s128", "q8row"])
@pytest.mark.parametrize("guided", [None, "importance", "compensation"])
def test_what_is_written_is_what_was_chosen(name: str, guided: str | None) -> None:
    x, type_ = rows(), type_of(name)
    inputs = rows(500, seed=1)
    guide = {
        None: None,
        "importance": inputs.square().mean(0),
        "compensation": Compensation.of(inputs.T @ inputs, 0.01),
    }[guided]
    blocks = round_rows(x, type_, guide)
    found = decoded(as_stored(blocks, type_).flatten(1), blocks.scales, type_)
    assert torch.equal(found, dequantize(blocks, type_))
    assert float((found - x).square().mean().sqrt() / x.square().mean().sqrt()) < type_.max_error


@pytest.mark.parametrize("name", ["q4s32", "q8row"])
def test_scales_are_above_zero_and_exact_in_the_file(name: str) -> None:
    x, type_ = rows(), type_of(name)
    x[3] = 0  # a row of nothing
    x[4] = x[4].abs()  # one whose largest weights are all above zero
    x[5] = 1e-42
    blocks = round_rows(x, type_, None)
    assert float(blocks.scales.min()) >= torch.finfo(torch.float32).tiny
    if type_.bits == 4:
        assert torch.equal(blocks.scales.bfloat16().float(), blocks.scales)
    assert not dequantize(blocks, type_)[3].any()


def test_positive_scales_reach_both_ends_of_a_block() -> None:
    """By hand: 4-bit integers go from -8 to 7, so 7 steps reach up and 8 down."""
    x, type_ = torch.zeros(2, 32), TYPES[PTE, "q4s32"]
    x[0, :2] = torch.tensor([7.0, -1.0])
    x[1, :2] = torch.tensor([7.0, -16.0])
    blocks = round_rows(x, type_, None)
    assert blocks.scales.tolist() == [[1.0], [2.0]]
    assert dequantize(blocks, type_)[:, :2].tolist() == [[7.0, -1.0], [8.0, -16.0]]


def test_a_scale_per_row_is_counted() -> None:
    type_ = TYPES[PTE, "q8row"]
    assert type_.block_size == WHOLE_ROW and type_.holds(97)
    assert type_.row_bytes("rows", 97) == 97 + 4
    assert type_.of_row(96).block_size == 96
    assert TYPES[PTE, "q4s32"].row_bytes("rows", 96) == 48 + 3 * 2
