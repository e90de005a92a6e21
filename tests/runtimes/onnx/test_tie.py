"""Embedding and head are found by what the graph does with them, not by anybody's names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fox_edge.errors import VerificationError
from runtimes.onnx.external import read_graph
from runtimes.onnx.tie import GraphIndex, Tie, find_tie

ROWS, COLUMNS = 64, 32
BYTES = 4 * ROWS * COLUMNS
MATRIX = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)


def weight(name: str, value: np.ndarray = MATRIX) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(value), name)


def tie_of(folder: Path, nodes: list[NodeProto], *weights: TensorProto) -> Tie:
    """The tie of a graph from `input_ids` to `logits`, written and read back."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("n",))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("n", ROWS))
    graph = helper.make_graph(nodes, "g", [ids], [logits], list(weights))
    (folder / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    return find_tie(GraphIndex(read_graph(folder / "m.onnx").graph), folder)


def node(op: str, inputs: str, output: str, **attributes: object) -> NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def test_one_initializer(tmp_path: Path) -> None:
    nodes = [node("Gather", "w input_ids", "x"), node("Gemm", "x w", "logits", transB=1)]
    tie = tie_of(tmp_path, nodes, weight("w"))
    assert tie.one_copy and not tie.is_copied_at_load
    assert tie.sentence() == f"embedding and head are one copy of {BYTES:,} bytes in the files"


def test_two_initializers(tmp_path: Path) -> None:
    """Optimum's export: the head is transposed and lies apart, under a number for a name."""
    nodes = [node("Gather", "w input_ids", "x"), node("MatMul", "x onnx::MatMul_7", "logits")]
    tie = tie_of(tmp_path, nodes, weight("w"), weight("onnx::MatMul_7", MATRIX.T))
    assert not tie.one_copy and tie.second_bytes == BYTES
    assert tie.sentence() == (
        f"embedding and head are two copies: the head's 'onnx::MatMul_7' takes {BYTES:,} bytes besides the "
        f"{BYTES:,} of the embedding's 'w'"
    )


def test_a_transposition_on_the_way(tmp_path: Path) -> None:
    """Optimum's export when accelerate is installed."""
    nodes = [
        node("Gather", "w input_ids", "x"),
        node("Transpose", "w", "t", perm=[1, 0]),
        node("MatMul", "x t", "logits"),
    ]
    tie = tie_of(tmp_path, nodes, weight("w"))
    assert tie.one_copy and tie.is_copied_at_load
    assert f"read through Transpose: ONNX Runtime makes a second one of {BYTES:,} bytes" in tie.sentence()


def test_integers_behind_several_operators(tmp_path: Path) -> None:
    """Optimum's int8: product of integers, then a cast and a scale; a lookup in bytes of its own."""
    nodes = [
        node("Unsqueeze", "input_ids axis", "ids"),
        node("Cast", "ids", "ids32", to=TensorProto.INT32),
        node("Gather", "w ids32", "q"),
        node("DequantizeLinear", "q scale", "x"),
        node("DynamicQuantizeLinear", "x", "x8"),
        node("MatMulInteger", "x8 h", "y32"),
        node("Cast", "y32", "y", to=TensorProto.FLOAT),
        node("Mul", "y scale", "logits"),
    ]
    small = weight("scale", np.array([0.5], np.float32)), weight("axis", np.array([0]))
    tie = tie_of(
        tmp_path, nodes, weight("w", MATRIX.astype(np.uint8)), weight("h", MATRIX.T.astype(np.int8)), *small
    )
    assert tie.second == ("h",) and tie.second_bytes == ROWS * COLUMNS


def test_a_head_in_slices(tmp_path: Path) -> None:
    nodes = [
        node("Gather", "w input_ids", "x"),
        *(node("Gemm", f"x h{i}", f"y{i}", transB=1) for i in range(3)),
        node("Concat", "y0 y1 y2", "logits", axis=-1),
    ]
    slices = [weight(f"h{i}", rows) for i, rows in enumerate(np.split(MATRIX, [20, 40]))]
    tie = tie_of(tmp_path, nodes, weight("w"), *slices)
    assert [head.tensors[0].name for head in tie.heads] == ["h0", "h1", "h2"]
    assert "the head's 'h0' and 2 more take 8,192 bytes besides" in tie.sentence()


@pytest.mark.parametrize("missing", ["embedding", "head"])
def test_a_graph_without_one_of_them(missing: str, tmp_path: Path) -> None:
    embed = [node("Gather", "w input_ids", "x"), node("Relu", "x", "logits")]
    head = [node("Cast", "input_ids", "x", to=TensorProto.FLOAT), node("MatMul", "x w", "logits")]
    with pytest.raises(VerificationError, match=f"the graph has no {missing}: "):
        tie_of(tmp_path, embed if missing == "head" else head, weight("w"))


def test_a_graph_that_goes_in_circles(tmp_path: Path) -> None:
    """No valid model; yet the search ends."""
    nodes = [
        node("Gather", "w input_ids", "x"),
        node("Mul", "logits a", "a"),
        node("Add", "a a", "logits"),
        node("Reshape", "r", "r"),
        node("MatMul", "a r", "a"),
    ]
    with pytest.raises(VerificationError, match="no head"):
        tie_of(tmp_path, nodes, weight("w"))


def test_bytes_that_overlap_only_in_part_are_a_second_copy(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(2 * BYTES))
    tensors = []
    for name, offset in (("w", 0), ("h", 64)):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[ROWS, COLUMNS], data_location=1)
        for key, value in (("location", "data"), ("offset", str(offset)), ("length", str(BYTES))):
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
    nodes = [node("Gather", "w input_ids", "x"), node("Gemm", "x h", "logits", transB=1)]
    assert tie_of(tmp_path, nodes, *tensors).second == ("h",)
    tensors[1].external_data[1].value = "0"
    assert tie_of(tmp_path, nodes, *tensors).one_copy
