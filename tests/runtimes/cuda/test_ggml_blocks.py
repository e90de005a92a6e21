"""ggml's types taken apart: random blocks against gguf-py's dequantization, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fox_edge.quant import GGUF, TYPES, type_names
from runtimes.cuda.form import FLOATS, Form, put
from runtimes.cuda.ggml_blocks import BLOCK_TYPES, levels
from runtimes.cuda.ops import Dense, Packed, dequantize
from runtimes.llama_cpp.gguf_file import dequantize as by_gguf_py

ROWS, BLOCKS = 40, 3
by_name = pytest.mark.parametrize("name", BLOCK_TYPES)
# Where a block's float16 scales are; the one exponent byte of mxfp4 and nvfp4's four are elsewhere.
SCALES_AT = {"q6_k": [208], "q3_k": [108], "q2_k": [80, 82], "tq2_0": [64], "tq1_0": [52]}
TWO_SCALES = ("q4_1", "q5_1", "q4_k", "q5_k")


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def blocks_of(name: str) -> np.ndarray:
    """Rows of random bytes, whose scales are numbers that weights could have, negative and zero ones too."""
    rng = np.random.default_rng(len(name))
    size = BLOCK_TYPES[name].block_bytes
    raw = rng.integers(0, 256, (ROWS * BLOCKS, size), dtype=np.uint8)
    if name == "mxfp4":
        raw[:, 0] = rng.integers(100, 140, len(raw))
    elif name != "nvfp4":
        for at in SCALES_AT.get(name, [0, 2] if name in TWO_SCALES else [0]):
            scales = rng.normal(0, 0.02, len(raw)).astype(np.float16)
            scales[::17] = 0
            scales[::19] = 6e-8  # the smallest that there is
            raw[:, at : at + 2] = scales[:, None].view(np.uint8)
    return raw.reshape(ROWS, -1)


def held(name: str, form: Form) -> Packed:
    """Such rows in a matrix of that form."""
    raw = torch.from_numpy(blocks_of(name))
    columns = BLOCKS * TYPES[GGUF, name].block_size
    matrix = form.make(ROWS, columns, torch.float32, empty)
    assert isinstance(matrix, Packed)
    put(matrix, 0, levels(raw, BLOCK_TYPES[name]), name)
    return matrix


def test_only_lattices_and_floats_are_missing() -> None:
    missing = set(type_names(GGUF)) - set(BLOCK_TYPES)
    assert all(name.startswith(("iq1", "iq2", "iq3")) or name in ("f32", "f16", "bf16") for name in missing)


@by_name
def test_the_table_agrees_with_the_recipe_s(name: str) -> None:
    ours, theirs = BLOCK_TYPES[name], TYPES[GGUF, name]
    assert 8 * ours.block_bytes == theirs.block_bits
    assert theirs.block_size % ours.form.block == 0


@by_name
def test_levels_are_the_floats_of_gguf_py(name: str) -> None:
    raw = blocks_of(name)
    want = by_gguf_py(raw, name)
    assert np.unique(want).size > 2
    np.testing.assert_array_equal(levels(torch.from_numpy(raw), BLOCK_TYPES[name]).values().numpy(), want)


@by_name
def test_a_matrix_on_the_device_holds_them(name: str) -> None:
    want = by_gguf_py(blocks_of(name), name)
    matrix = held(name, BLOCK_TYPES[name].form)
    np.testing.assert_array_equal(dequantize(matrix, torch.empty(want.shape)).numpy(), want)


@by_name
@pytest.mark.parametrize("other", ["q8_0", "q6_k", "q5_k", "q4_1"])
def test_and_so_does_one_that_others_are_in_too(name: str, other: str) -> None:
    """Fused with another type, rows lie wider, in smaller blocks, or with offsets: the same floats."""
    want = by_gguf_py(blocks_of(name), name)
    form = BLOCK_TYPES[name].form.join(BLOCK_TYPES[other].form)
    assert form == BLOCK_TYPES[other].form.join(BLOCK_TYPES[name].form)
    np.testing.assert_array_equal(dequantize(held(name, form), torch.empty(want.shape)).numpy(), want)


def test_floats_take_levels_too() -> None:
    want = by_gguf_py(blocks_of("q4_k"), "q4_k")
    matrix = FLOATS.make(*want.shape, torch.float32, empty)
    assert isinstance(matrix, Dense)
    put(matrix, 0, levels(torch.from_numpy(blocks_of("q4_k")), BLOCK_TYPES["q4_k"]), "q4_k")
    np.testing.assert_array_equal(matrix.weight.numpy(), want)
    assert BLOCK_TYPES["q4_k"].form.join(FLOATS) == FLOATS.join(BLOCK_TYPES["q4_k"].form) == FLOATS
