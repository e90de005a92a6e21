"""Changes a graph between reading and opening it, so that one export serves more than one setting.

Pure functions on a ModelProto: how precisely matrix products compute, and what the KV cache stores. Knows
operators and attributes; not onnxruntime's sessions, and not where numbers such as the scales come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fox_edge.errors import ArtifactError, FoxEdgeError
from runtimes.onnx.external import onnx

# MatMulNBits: 1 computes in float32, 4 quantizes its input to int8 row by row (what an export asks for).
ACCURACY_LEVELS = (1, 4)
# Inputs of GroupQueryAttention before the scales of its keys and values.
_K_SCALE = 12


def set_accuracy_level(model: onnx.ModelProto, level: int) -> None:
    """Compute every product with quantized weights at this level; raises FoxEdgeError for an unknown one."""
    if level not in ACCURACY_LEVELS:
        raise FoxEdgeError(f"accuracy level {level} is none of {', '.join(map(str, ACCURACY_LEVELS))}")
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            _set(node, "accuracy_level", level)


def quantize_kv(
    model: onnx.ModelProto, scales: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]
) -> None:
    """Keep keys and values as int8: `scales` are a layer's of keys and of values, each (kv_heads, head_dim).

    A value v of a channel is stored as the integer nearest to v / scale, at most 127. Raises ArtifactError
    when the graph has another number of attention layers.
    """
    layers = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    if len(layers) != len(scales):
        raise ArtifactError(
            f"{len(scales)} layers have KV scales, but the graph has {len(layers)} of attention"
        )
    for node, pair in zip(layers, scales, strict=True):
        node.input.extend([""] * (_K_SCALE - len(node.input)))
        for part, scale in zip("kv", pair, strict=True):
            name = f"{node.name}.{part}_scale"
            model.graph.initializer.append(onnx.numpy_helper.from_array(scale[None, :, None, :], name))
            node.input.append(name)
            _set(node, f"{part}_quant_type", "PER_CHANNEL")
        _set(node, "kv_cache_bit_width", 8)
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8


def _set(node: onnx.NodeProto, name: str, value: int | str) -> None:
    """Give a node's attribute a value, whether it has one or not."""
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
