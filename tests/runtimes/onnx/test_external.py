"""The gate for ONNX files: weights stay where they are, and nothing that a file says goes unchecked."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fox_edge.errors import ArtifactError
from runtimes.onnx import external as onnx_external
from runtimes.onnx.external import External, read_graph


def matrix(kind: type = np.float32) -> np.ndarray:
    return np.arange(4096).reshape(64, 64).astype(kind)


def model(*tensors: TensorProto) -> onnx.ModelProto:
    """A model that does something, with these initializers and a small constant."""
    small = numpy_helper.from_array(np.array([1, 2, 3]), "small")
    node = helper.make_node("Identity", ["x"], ["y"])
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1,)) for name in "xy"]
    graph = helper.make_graph([node], "graph", value[:1], value[1:], [*tensors, small])
    return helper.make_model(graph, producer_name="somebody")


def written(folder: Path, *tensors: TensorProto) -> Path:
    path = folder / "a model.onnx"
    path.write_bytes(model(*tensors).SerializeToString())
    return path


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64, np.uint8, np.int8, np.int32, np.int64])
def test_weights_inside_the_file_become_ranges_of_it(kind: type, tmp_path: Path) -> None:
    path = written(tmp_path, numpy_helper.from_array(matrix(kind), "weight"))
    read, whole = read_graph(path), onnx.load(path)
    weight, small = read.graph.initializer
    at = External.of(weight, tmp_path)
    assert at.path == path and at.length == 4096 * np.dtype(kind).itemsize
    stored = path.read_bytes()[at.offset : at.offset + at.length]
    np.testing.assert_array_equal(np.frombuffer(stored, kind).reshape(64, 64), matrix(kind))
    # All else is what protobuf reads.
    assert small == whole.graph.initializer[1]
    assert list(read.graph.node) == list(whole.graph.node) and read.producer_name == "somebody"
    assert read.ByteSize() < 1000


def test_four_bit_elements_take_half_a_byte(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.UINT4, dims=[64, 65], raw_data=bytes(2080))
    assert External.of(read_graph(written(tmp_path, tensor)).graph.initializer[0], tmp_path).length == 2080


def test_a_length_that_is_not_told_is_the_tensors(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(100 + 4 * 4096))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64, 64], data_location=1)
    for key, value in (("location", "data"), ("offset", "100")):
        tensor.external_data.add(key=key, value=value)
    read = read_graph(written(tmp_path, tensor))
    assert External.of(read.graph.initializer[0], tmp_path).length == 4 * 4096


def test_weights_that_are_not_as_long_as_their_shape(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(matrix(), "weight")
    tensor.dims[0] = 65
    with pytest.raises(ArtifactError, match="'weight' needs 16640 bytes and names 16384 from"):
        read_graph(written(tmp_path, tensor))


@pytest.mark.parametrize("keep", [1, 10, 200, 5000, 16384])
def test_a_model_file_cut_short(keep: int, tmp_path: Path) -> None:
    path = written(tmp_path, numpy_helper.from_array(matrix(), "weight"))
    os.truncate(path, keep)
    with pytest.raises(ArtifactError, match=f"{keep} bytes that are no ONNX model"):
        read_graph(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a model",
        bytes(1 << 16),
        b"\xff" * 100,
        b"\x3b" + bytes(10),  # a group, which ONNX does not use
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a graph of 2^64 bytes
    ],
)
def test_bytes_that_are_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"model\.onnx: {len(content)} bytes that are no ONNX model"):
        read_graph(tmp_path / "model.onnx")


def test_what_is_parsed_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, numpy_helper.from_array(matrix(), "weight"))
    monkeypatch.setattr(onnx_external, "MAX_GRAPH_BYTES", 4000)
    read_graph(path)  # 16 kB of weights do not count
    many = model(numpy_helper.from_array(matrix(), "weight"))
    many.doc_string = "x" * 4000
    path.write_bytes(many.SerializeToString())
    with pytest.raises(ArtifactError, match="more than 4000 bytes besides its weights"):
        read_graph(path)


def test_a_swarm_of_tiny_fields_is_bounded(tmp_path: Path) -> None:
    """Two bytes each, which would become objects of a hundred: they are counted for more than their size."""
    (tmp_path / "model.onnx").write_bytes(b"\x3a\x80\x80\x80\x01" + b"\x2a\x00" * (1 << 20))
    with pytest.raises(ArtifactError, match="more than"):
        read_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\\b", "C:x", "line\nbreak", ""])
def test_names_that_are_no_plain_file_names(name: str, tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value=name)
    with pytest.raises(ArtifactError, match="which is no file of this folder"):
        read_graph(written(tmp_path, tensor))
