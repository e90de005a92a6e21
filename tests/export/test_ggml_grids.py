"""ggml's blocks taken apart: read as gguf-py reads them, put together again, and rounded for an input."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from export.compensate import Compensation, gram
from export.ggml import quantize
from export.ggml_grids import LAYOUTS, BlockGrid, dequantize, quantize_compensated
from fox_edge.quant import GGUF, TYPES, QuantType, type_names

ROUNDED = [TYPES[GGUF, name] for name in type_names(GGUF) if TYPES[GGUF, name].bits]
each = pytest.mark.parametrize("type_", ROUNDED, ids=lambda t: t.name)
taken_apart = pytest.mark.parametrize("name", LAYOUTS)


def blocks_of(type_: QuantType, rows: torch.Tensor) -> np.ndarray:
    return quantize(type_, rows.numpy(), np.ones(rows.shape[1], dtype=np.float32))


def weights(rows: int = 24, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def guide_of(columns: int = 512) -> tuple[Compensation, torch.Tensor]:
    """Correlated activations, as a network's are, and their Gram matrix (C, C)."""
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(1500, columns // 8, generator=generator)
    x = few @ torch.randn(columns // 8, columns, generator=generator)
    x += 2 * torch.randn(1500, columns, generator=generator)
    x *= torch.rand(columns, generator=generator) + 0.1
    return Compensation.of(gram(x)), gram(x)


@taken_apart
def test_levels_and_scales_are_those_that_gguf_py_reads(name: str) -> None:
    type_ = TYPES[GGUF, name]
    blocks = blocks_of(type_, weights())
    if name == "q1_0":  # gguf-py does not read it: a scale and 128 signs, lowest bit first
        each = blocks.reshape(24, -1, 18)
        signs = np.unpackbits(each[..., 2:], axis=-1, bitorder="little") * 2.0 - 1
        want = (signs * np.ascontiguousarray(each[..., :2]).view("<f2").astype(np.float32)).reshape(24, -1)
    else:
        want = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(dequantize(type_, blocks).numpy(), want)


@taken_apart
def test_blocks_are_put_together_as_they_were(name: str) -> None:
    type_ = TYPES[GGUF, name]
    blocks = torch.from_numpy(blocks_of(type_, weights()))
    before = blocks.clone()
    grid = BlockGrid(blocks, type_)
    numbers = grid.layout.get(grid.blocks).view(24, -1)
    assert len(numbers.unique()) > len(grid.layout.levels) // 2
    grid.store(torch.zeros_like(numbers))
    assert not torch.equal(blocks, before)
    grid.store(numbers)
    assert torch.equal(blocks, before)


@taken_apart
def test_every_level_has_a_place_of_its_own(name: str) -> None:
    type_ = TYPES[GGUF, name]
    grid = BlockGrid(torch.from_numpy(blocks_of(type_, weights())), type_)
    numbers = torch.randint(0, len(grid.layout.levels), (24, 512), dtype=torch.uint8)
    grid.store(numbers)
    assert torch.equal(grid.layout.get(grid.blocks).view(24, -1), numbers)


@each
def test_a_product_with_the_input_changes_less(type_: QuantType) -> None:
    rows, (guide, total) = weights(), guide_of()

    def loss(blocks: np.ndarray) -> float:
        error = dequantize(type_, blocks) - rows
        return float(((error @ total) * error).sum())

    plain = loss(quantize(type_, rows.numpy(), guide.importance.numpy()))
    blocks = quantize_compensated(type_, rows, guide)
    if type_.name in ("tq1_0", "tq2_0"):  # never compensated
        assert loss(blocks) == plain
        return
    assert blocks.shape == (24, type_.row_bytes("t", 512))
    # Blocks as long as the row leave no column to make good for them but those of the other block.
    assert loss(blocks) < (0.85 if type_.name in LAYOUTS else 0.99) * plain


@each
def test_rows_do_not_depend_on_their_neighbours(type_: QuantType) -> None:
    rows, (guide, _) = weights(), guide_of()
    whole = dequantize(type_, quantize_compensated(type_, rows, guide))
    part = dequantize(type_, quantize_compensated(type_, rows[8:16], guide))
    # Matrix products of another height round differently in the last bit, and a tie may fall differently.
    assert float((whole[8:16] != part).float().mean()) < 0.02


@each
def test_zeros_stay_zeros(type_: QuantType) -> None:
    guide, _ = guide_of()
    back = dequantize(type_, quantize_compensated(type_, torch.zeros(2, 512), guide))
    assert torch.isfinite(back).all() and float(back.abs().max()) < 1e-4
