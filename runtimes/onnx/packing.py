"""How onnxruntime packs one matrix, where the result goes, and by which name it is found again.

The layout of a packed file follows from the graph alone, so that nothing which lies beside an artifact
decides where a kernel reads. Knows matrices, onnxruntime's way to save what it packed and to name it; not
folders, what is still good, or sessions of a whole model.

How a session gets to packed data: onnxruntime looks them up by the hash of what its kernel packs *when the
session opens*. It must be given something to pack, and only its hash counts. It is given the packed bytes
themselves: so the artifact's own matrix is not read at all, and no second copy of it is kept.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fox_edge.errors import ArtifactError
from runtimes.onnx.engine import open_engine
from runtimes.onnx.external import onnx

# Places start where every system can map them.
_ALIGN = 64 << 10
_SAVE = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_min_size_in_bytes": "0",
}


@dataclass(frozen=True)
class Slot:
    """Where a matrix is packed: `size` is more than any kernel needs, `raw` what it has in the artifact."""

    node: onnx.NodeProto
    raw: int
    offset: int
    size: int

    @property
    def name(self) -> str:
        """The initializer."""
        return str(self.node.input[1])


def lay_out(model: onnx.ModelProto) -> list[Slot]:
    """A slot for every matrix that only products read. Follows from the graph alone, so that nothing which
    lies in a cache decides where a kernel reads."""
    nodes = list(model.graph.node)
    if any(attribute.HasField("g") for node in nodes for attribute in node.attribute):
        return []
    uses = Counter(name for node in nodes for name in node.input)
    uses.update(value.name for value in [*model.graph.input, *model.graph.output])
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    slots: list[Slot] = []
    offset = 0
    for node in nodes:
        tensor = tensors.get(node.input[1]) if node.op_type == "MatMulNBits" else None
        if tensor is None or uses[tensor.name] > 1 or not _is_whole(node, tensor):
            continue
        rows, blocks, blob = tensor.dims
        raw = rows * blocks * blob
        # Beside the integers a kernel keeps a scale and a correction per block, its rows filled up.
        size = raw + 8 * blocks * (-(-rows // 64) * 64) + _ALIGN
        size = -(-size // _ALIGN) * _ALIGN
        slots.append(Slot(node, raw, offset, size))
        offset += size
    return slots


def _is_whole(node: onnx.NodeProto, tensor: onnx.TensorProto) -> bool:
    """Whether a matrix is a range of a file, of the size that its operator reckons with."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL or len(tensor.dims) != 3:
        return False
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns, bits, size = (numbers.get(name, 0) for name in ("N", "K", "bits", "block_size"))
    return size > 0 and list(tensor.dims) == [rows, -(-columns // size), size * bits // 8]


class Packer:
    """Packs one matrix at a time, each in a graph of its own: no more than that is ever held twice.

    `model` is the graph of the folder `artifact`, `packed` the packed file as seen from there, `handle` the
    same file, open for writing. Files that come and go are made beside it.
    """

    def __init__(self, model: onnx.ModelProto, artifact: Path, packed: str, handle: int) -> None:
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._artifact, self._packed, self._handle = artifact, packed, handle
        self._scratch = (artifact / packed).parent

    def pack(self, slot: Slot) -> str:
        """Write what the kernel packs into the slot; returns the key under which it will be looked up.

        Raises ArtifactError when onnxruntime saves no packed data, or more than fit.
        """
        with self._saved(slot, None) as (_, data):
            if not slot.raw <= len(data) <= slot.size:
                raise ArtifactError(f"{slot.name}: {len(data)} packed bytes do not fit {slot.size}")
            offset = slot.offset
            while data:
                written = os.pwrite(self._handle, data, offset)
                data, offset = data[written:], offset + written
        with self._saved(slot, self._packed) as (key, _):
            return key

    @contextlib.contextmanager
    def _saved(self, slot: Slot, location: str | None) -> Iterator[tuple[str, memoryview]]:
        """Key and bytes of what onnxruntime packs, of the artifact's own matrix or of the slot's bytes."""
        stem = secrets.token_hex(8)
        graph, data = self._scratch / f"{stem}.onnx", self._scratch / f"{stem}.bin"
        try:
            extra = {**_SAVE, "session.optimized_model_external_initializers_file_name": data.name}
            model = self._product(slot, location)
            open_engine(model, self._artifact, 1, self._artifact / slot.name, extra, graph)
            saved = onnx.load(graph, load_external_data=False)
            tensor = next(t for t in saved.graph.initializer if t.name == slot.name)
            fields = {entry.key: entry.value for entry in tensor.external_data}
            if "prepacked_0" not in fields or "prepacked_1" in fields:
                raise ArtifactError(f"{slot.name}: this onnxruntime does not save packed weights")
            key, _, place = fields["prepacked_0"].rpartition("|")
            start, size, *_ = (int(number) for number in place.split(";"))
            packed = np.memmap(data, np.uint8, "r", start, (size,))
            yield checked_key(key), memoryview(packed)  # type: ignore[arg-type]
            del packed
        finally:
            graph.unlink(missing_ok=True)
            data.unlink(missing_ok=True)

    def _product(self, slot: Slot, location: str | None) -> onnx.ModelProto:
        """A model of one matrix product."""
        tensors = []
        for name in filter(None, slot.node.input[1:]):
            tensor = onnx.TensorProto()
            tensor.CopyFrom(self._tensors[name])
            if name == slot.name and location is not None:
                point(tensor, location, slot.offset, slot.raw)
            tensors.append(tensor)
        info, floats = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [slot.node],
            "product",
            [info(slot.node.input[0], floats, ("rows", "columns"))],
            [info(slot.node.output[0], floats, ("rows", "results"))],
            tensors,
        )
        versions = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
        return onnx.helper.make_model(graph, ir_version=10, opset_imports=versions)


def point(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Let a tensor's data be a range of a file."""
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def checked_key(text: str) -> str:
    """onnxruntime's name for packed data, once it is sure that it names nothing else."""
    if not re.fullmatch(r"[A-Za-z]+\+[0-9]{1,20}", text):
        raise ValueError(f"'{text[:40]}' is no key of packed weights")
    return text
