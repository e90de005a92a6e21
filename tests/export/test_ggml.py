"""ggml's quantizers through ctypes: blocks by hand, gguf-py's numpy, and the table's error bounds."""

from __future__ import annotations

import importlib.util
import struct

import gguf
import numpy as np
import pytest

from export import ggml, ggml_grids
from fox_edge.errors import MissingPackageError, RecipeError
from fox_edge.quant import GGUF, TYPES, type_names


def _normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def test_a_q8_0_block_by_hand() -> None:
    # The largest weight is 127, so the scale is 1 and every whole number stands for itself.
    weights = [127, -126, 1, -1, 0, 2, -2, 64] * 4
    block = ggml.quantize(TYPES[GGUF, "q8_0"], np.array([weights], dtype=np.float32))
    assert block.tobytes() == struct.pack("<e32b", 1.0, *weights)


def test_a_q4_0_block_by_hand() -> None:
    # The largest weight is -8, so the scale is 1 and a weight w is stored as w + 8; the first sixteen in
    # the low halves of the bytes, the others in the high halves.
    weights = [n - 8 for n in range(16)] + [7 - n for n in range(16)]
    block = ggml.quantize(TYPES[GGUF, "q4_0"], np.array([weights], dtype=np.float32))
    packed = [(low + 8) | (high + 8) << 4 for low, high in zip(weights[:16], weights[16:], strict=True)]
    assert block.tobytes() == struct.pack("<e16B", 1.0, *packed)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_bytes_are_those_of_gguf_pys_numpy(name: str) -> None:
    rows = _normal(16, 256)
    ours = ggml.quantize(TYPES[GGUF, name], rows)
    theirs = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(ours, theirs.view(np.uint8).reshape(ours.shape))


def _read(name: str, blocks: np.ndarray) -> np.ndarray:
    """What blocks stand for, without our code where gguf-py reads the type."""
    if name == "f32":
        return np.frombuffer(blocks.tobytes(), "<f4")
    if name == "q1_0":
        return ggml_grids.dequantize(TYPES[GGUF, name], blocks).numpy()
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])


@pytest.mark.parametrize("name", type_names(GGUF))
def test_every_type_stays_within_its_bound(name: str) -> None:
    type_, rows = TYPES[GGUF, name], _normal(8, 1024, seed=1)
    blocks = ggml.quantize(type_, rows, np.ones(1024, dtype=np.float32))
    assert blocks.shape == (8, type_.row_bytes("t", 1024))
    back = _read(name, blocks)
    error = np.linalg.norm(back.reshape(rows.shape) - rows) / np.linalg.norm(rows)
    assert error < type_.max_error
    # A bound that nothing could break would be no bound.
    assert name == "f32" or error > type_.max_error / 10


@pytest.mark.parametrize("name", ggml.NEED_IMPORTANCE)
def test_a_type_that_cannot_do_without_importance_is_refused_without(name: str) -> None:
    with pytest.raises(RecipeError, match=f"blk.0: {name} is rounded by what its columns are worth"):
        ggml.quantize(TYPES[GGUF, name], _normal(1, 256), tensor="blk.0")


def test_all_of_ggmls_quantizers_have_a_row_in_the_table() -> None:
    # Numbers in ggml.h that can be quantized to: all but q8_1 and q8_K (inner types), whole numbers, float64,
    # what was removed from the format, and q2_0, which gguf-py cannot write yet.
    quantizers = {*range(30), *range(30, 42)} - {4, 5, 9, 15, 24, 25, 26, 27, 28, 31, 32, 33, 36, 37, 38}
    assert {ggml.TYPE_NUMBERS[name] for name in type_names(GGUF)} == quantizers


def test_rows_do_not_depend_on_their_neighbours() -> None:
    rows = _normal(4, 512)
    together = ggml.quantize(TYPES[GGUF, "q4_k"], rows)
    alone = [ggml.quantize(TYPES[GGUF, "q4_k"], rows[n : n + 1]) for n in range(4)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    rows = _normal(32, 256)
    importance = np.ones(256, dtype=np.float32)
    importance[::4] = 100
    kind = gguf.GGMLQuantizationType.Q4_K
    plain = gguf.quants.dequantize(ggml.quantize(TYPES[GGUF, "q4_k"], rows), kind)
    weighted = gguf.quants.dequantize(ggml.quantize(TYPES[GGUF, "q4_k"], rows, importance), kind)
    assert np.square(weighted - rows)[:, ::4].mean() < 0.9 * np.square(plain - rows)[:, ::4].mean()
    with pytest.raises(ValueError, match="importance"):
        ggml.quantize(TYPES[GGUF, "q4_k"], rows, importance[:8])


def test_a_row_of_broken_blocks_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"blk\.0: a row of 300 weights .* q4_k blocks of 256"):
        ggml.quantize(TYPES[GGUF, "q4_k"], _normal(1, 300), tensor="blk.0")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"llama-cpp-python .*fox-edge\[gguf\]"):
        ggml.library_path()
