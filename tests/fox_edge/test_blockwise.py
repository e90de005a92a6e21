"""Our block quantizer: by hand, and against ONNX Runtime's own operators."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from fox_edge.blockwise import Blocks, dequantize, pack, quantize, unpack
from fox_edge.errors import RecipeError
from fox_edge.quant import ONNX, TYPES, QuantType

QUANTIZED = [t for (format, _), t in TYPES.items() if format == ONNX and t.bits]
by_name = pytest.mark.parametrize("type_", QUANTIZED, ids=lambda t: t.name)


def type_of(name: str) -> QuantType:
    return TYPES[ONNX, name]


def rows_of(type_: QuantType, rows: int = 5, blocks: int = 3) -> torch.Tensor:
    """An odd number of blocks, so that narrow zero points end in a half-used byte."""
    generator = torch.Generator().manual_seed(type_.block_size + type_.bits)
    return torch.randn(rows, blocks * type_.block_size, generator=generator)


def test_symmetric_block_by_hand() -> None:
    # Largest magnitude: +8, so the step is -1 and +8 becomes 0; 8 means zero; -7 becomes 15.
    row = torch.tensor([[8.0, -7.0, 0.0, 1.0, -1.0, 2.4, 2.6, -6.9] + [0.0] * 8])
    blocks = quantize(row, type_of("q4s16"))
    integers = [0, 15, 8, 7, 9, 6, 5, 15] + [8] * 8
    want = [low | high << 4 for low, high in zip(integers[0::2], integers[1::2], strict=True)]
    assert blocks.packed.tolist() == [[want]]
    assert blocks.scales.tolist() == [[-1.0]]
    assert blocks.zero_points is None
    restored = [8, -7, 0, 1, -1, 2, 3, -7] + [0] * 8
    assert dequantize(blocks, type_of("q4s16")).tolist() == [restored]


def test_asymmetric_block_by_hand() -> None:
    # From -1 to 2 over 3 steps: step 1, zero is integer 1.
    row = torch.tensor([[-1.0, 2.0, 0.0, 1.0, 1.0, 2.0, -1.0, 2.0] + [0.0] * 8])
    blocks = quantize(row, type_of("q2a16"))
    assert blocks.scales.tolist() == [[1.0]]
    assert blocks.zero_points is not None and blocks.zero_points.tolist() == [[1]]
    integers = [0, 3, 1, 2, 2, 3, 0, 3] + [1] * 8
    want = [sum(integers[4 * i + j] << 2 * j for j in range(4)) for i in range(4)]
    assert blocks.packed.tolist() == [[want]]


def test_byte_block_by_hand() -> None:
    row = torch.tensor([[-64.0, 63.5, 0.0, 0.5] * 4])
    blocks = quantize(row, type_of("q8s16"))
    assert blocks.scales.tolist() == [[0.5]]
    assert blocks.packed.tolist() == [[[0, 255, 128, 129] * 4]]


def test_packing_pads_the_last_byte() -> None:
    integers = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert pack(integers, 4).tolist() == [[0x21, 0x03]]
    assert pack(integers, 2).tolist() == [[0b00111001]]
    assert unpack(pack(integers, 4), 4).tolist() == [[1, 2, 3, 0]]


@by_name
def test_error_is_within_the_types_bound(type_: QuantType) -> None:
    rows = rows_of(type_, rows=64)
    error = (dequantize(quantize(rows, type_), type_) - rows).square().mean().sqrt()
    assert 0 < error / rows.square().mean().sqrt() < type_.max_error


def weighted_errors(rows: torch.Tensor, blocks: Blocks, type_: QuantType, cost: torch.Tensor) -> torch.Tensor:
    """(R, B)"""
    errors = (dequantize(blocks, type_) - rows).square() * cost
    return errors.view(rows.shape[0], -1, type_.block_size).sum(-1)


@by_name
def test_a_searched_grid_is_better_where_it_counts(type_: QuantType) -> None:
    rows = rows_of(type_, rows=64)
    cost = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(1)) ** 4 + 1e-3
    plain = weighted_errors(rows, quantize(rows, type_), type_, cost)
    searched = weighted_errors(rows, quantize(rows, type_, cost), type_, cost)
    even = weighted_errors(rows, quantize(rows, type_, torch.ones_like(cost)), type_, cost)
    assert searched.sum() < plain.sum()
    if type_.bits < 8:
        # A column that costs more is served better than when all cost the same.
        assert searched.sum() < 0.95 * plain.sum() and searched.sum() < 0.99 * even.sum()


def test_the_best_scale_by_hand() -> None:
    # The span's step is -1, so that -2.6 becomes -3. Only that column counts: the scale moves until it fits.
    row = torch.tensor([[8.0, 2.3, -2.6] + [0.0] * 13])
    cost = torch.tensor([0.0, 0.0, 1.0] + [0.0] * 13)
    restored = dequantize(quantize(row, type_of("q4s16"), cost), type_of("q4s16"))
    assert restored[0, 2] == pytest.approx(-2.6, rel=1e-6)
    assert dequantize(quantize(row, type_of("q4s16")), type_of("q4s16"))[0, 2] == -3


@by_name
@pytest.mark.parametrize("value", [0.0, 1e-40, -3e38, 3e38])
def test_extreme_blocks_stay_finite(type_: QuantType, value: float) -> None:
    rows = torch.full((2, type_.block_size), value)
    for cost in (None, torch.ones(type_.block_size)):
        restored = dequantize(quantize(rows, type_, cost), type_)
        assert torch.isfinite(restored).all()
        assert torch.allclose(restored, rows, rtol=0.5, atol=1e-30)


def test_a_row_of_broken_blocks_is_refused() -> None:
    with pytest.raises(RecipeError, match="100 weights is not a whole number of q4s32 blocks of 32"):
        quantize(torch.zeros(1, 100), type_of("q4s32"))


def run_node(
    op: str,
    order: list[str],
    inputs: dict[str, np.ndarray],
    constants: dict[str, np.ndarray],
    **attributes: int,
) -> np.ndarray:
    """One com.microsoft operator, its inputs in the given order, in a session of its own."""
    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    node = helper.make_node(op, order, ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, kinds[str(a.dtype)], a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            helper.make_tensor(n, kinds[str(a.dtype)], a.shape, a.tobytes(), raw=True)
            for n, a in constants.items()
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def constants_of(blocks: Blocks) -> dict[str, np.ndarray]:
    found = {"packed": blocks.packed, "scales": blocks.scales, "points": blocks.zero_points}
    return {name: tensor.numpy() for name, tensor in found.items() if tensor is not None}


@by_name
def test_matmul_nbits_reads_our_blocks(type_: QuantType) -> None:
    rows = rows_of(type_)
    blocks = quantize(rows, type_)
    constants = constants_of(blocks)
    C = rows.shape[1]
    got = run_node(
        "MatMulNBits",
        ["x", *constants],
        {"x": np.eye(C, dtype=np.float32)},
        constants,
        K=C,
        N=rows.shape[0],
        bits=type_.bits,
        block_size=type_.block_size,
    )
    np.testing.assert_allclose(got.T, dequantize(blocks, type_).numpy(), rtol=1e-5, atol=1e-6)


@by_name
def test_gather_block_quantized_reads_our_blocks(type_: QuantType) -> None:
    rows = rows_of(type_)
    blocks = quantize(rows, type_)
    constants = constants_of(blocks)
    constants["packed"] = constants["packed"].reshape(rows.shape[0], -1)
    order = ["packed", "ids", "scales"] + (["points"] if "points" in constants else [])
    got = run_node(
        "GatherBlockQuantized",
        order,
        {"ids": np.array([4, 0, 4, 2])},
        constants,
        bits=type_.bits,
        block_size=type_.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    np.testing.assert_allclose(got, dequantize(blocks, type_).numpy()[[4, 0, 4, 2]], rtol=1e-6)
