"""Where an ONNX graph keeps its embedding and its head, and whether the two are one copy of the same bytes.

Follows the graph from `input_ids` forward and from `logits` backward, so that it finds both whatever a tool
has named them and through whatever operators they are read. Knows graphs and byte ranges; no weight's value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fox_edge.errors import VerificationError
from runtimes.onnx.external import External, onnx

# Operators that hand on what they were given in another shape, order or type; their first input counts.
_CARRIERS = {"Reshape", "Transpose", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Slice"}
_DEQUANTIZERS = {"DequantizeLinear"}
# Operators between the head's product and the logits.
_FINISHERS = {"Mul", "Div", "Add", "Concat", *_CARRIERS, *_DEQUANTIZERS}
# Products -> the inputs that make up their weight, the integers or floats first.
_PRODUCTS: dict[str, tuple[int, ...]] = {
    "MatMulNBits": (1, 2, 3),
    "MatMul": (1,),
    "Gemm": (1,),
    "FusedMatMul": (1,),
    "FusedGemm": (1,),
    "MatMulInteger": (1,),
    "MatMulIntegerToFloat": (1, 3),
    "DynamicQuantizeMatMul": (1, 2),
    "QGemm": (3, 4),
    "QLinearMatMul": (3, 4),
}
_LOOKUPS: dict[str, tuple[int, ...]] = {"Gather": (0,), "GatherBlockQuantized": (0, 2, 3)}
# Hops between an end of the graph and the operator that is looked for; the head has a few, never many.
_MAX_HOPS = 64


@dataclass(frozen=True)
class Reader:
    """An operator that reads a constant matrix: its tensors (weight, scales, ...), and what lies between.

    `through` are the operators that stand between the weight and its reader.
    """

    node: onnx.NodeProto
    tensors: tuple[onnx.TensorProto, ...]
    through: tuple[str, ...] = ()


class GraphIndex:
    """A graph by its names: which operator makes a value, and which initializer holds one."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.initializers: dict[str, onnx.TensorProto] = {t.name: t for t in graph.initializer}
        self.makers: dict[str, onnx.NodeProto] = {
            name: node for node in graph.node for name in node.output if name
        }

    def embedding(self) -> Reader | None:
        """The lookup that `input_ids` goes into."""
        carried = {"input_ids"}
        for node in self.graph.node:
            if node.op_type in _LOOKUPS and len(node.input) > 1 and node.input[1] in carried:
                return self._reader(node, _LOOKUPS[node.op_type])
            if node.op_type in _CARRIERS and node.input and node.input[0] in carried:
                carried.update(node.output)
        return None

    def heads(self) -> list[Reader]:
        """The products that the logits are made of, in their order: one, or several slices of the rows."""
        found: list[Reader] = []
        waiting, hops = ["logits"], 0
        while waiting and hops < _MAX_HOPS:
            node = self.makers.get(waiting.pop(0))
            hops += 1
            if node is None:
                continue
            reader = self.product(node)
            if reader is not None:
                found.append(reader)
            elif node.op_type in _FINISHERS:
                waiting += node.input if node.op_type == "Concat" else node.input[:2]
        return found

    def product(self, node: onnx.NodeProto) -> Reader | None:
        """A matrix product with a constant, as what it reads; None for any other operator."""
        places = _PRODUCTS.get(node.op_type)
        return None if places is None else self._reader(node, places)

    def constant(self, name: str) -> tuple[onnx.TensorProto | None, tuple[str, ...]]:
        """The initializer that a value comes from, and the operators that it goes through on its way."""
        through: list[str] = []
        while name not in self.initializers and len(through) < _MAX_HOPS:
            node = self.makers.get(name)
            if node is None or not node.input or node.op_type not in _CARRIERS | _DEQUANTIZERS:
                return None, ()
            through.append(node.op_type)
            name = node.input[0]
        return self.initializers.get(name), tuple(reversed(through))

    def _reader(self, node: onnx.NodeProto, places: tuple[int, ...]) -> Reader | None:
        names = [node.input[place] for place in places if place < len(node.input) and node.input[place]]
        if not names:
            return None
        weight, through = self.constant(names[0])
        if weight is None or len(weight.dims) < 2:
            return None
        rest = [tensor for name in names[1:] if (tensor := self.constant(name)[0]) is not None]
        return Reader(node, (weight, *rest), through)


@dataclass(frozen=True)
class Tie:
    """How embedding and head lie in the files.

    `second` are the head's tensors whose bytes are not among the embedding's, `second_bytes` what they take.
    """

    embedding: Reader
    heads: tuple[Reader, ...]
    embedding_bytes: int
    second: tuple[str, ...]
    second_bytes: int

    @property
    def one_copy(self) -> bool:
        """Whether the files hold the matrix once."""
        return not self.second

    @property
    def through(self) -> list[str]:
        """The operators that stand between the matrix and its readers."""
        readers = (self.embedding, *self.heads)
        return list(dict.fromkeys(operator for reader in readers for operator in reader.through))

    @property
    def is_copied_at_load(self) -> bool:
        """Whether ONNX Runtime computes one of the two from the other when it loads, and keeps both."""
        return self.one_copy and bool(self.through)

    def sentence(self) -> str:
        """What was found, with the bytes."""
        if not self.one_copy:
            more = f" and {len(self.second) - 1} more" if len(self.second) > 1 else ""
            return (
                f"embedding and head are two copies: the head's '{self.second[0]}'{more} "
                f"take{'' if more else 's'} {self.second_bytes:,} bytes besides the "
                f"{self.embedding_bytes:,} of the embedding's '{self.embedding.tensors[0].name}'"
            )
        found = f"embedding and head are one copy of {self.embedding_bytes:,} bytes in the files"
        if not self.through:
            return found
        return (
            f"{found}, but read through {' and '.join(self.through)}: ONNX Runtime makes a second one of "
            f"{self.embedding_bytes:,} bytes in memory when it loads"
        )


def find_tie(index: GraphIndex, folder: Path) -> Tie:
    """Look for both ends; raises VerificationError when the graph has no embedding or no head."""
    embedding, heads = index.embedding(), index.heads()
    if embedding is None:
        raise VerificationError(
            "the graph has no embedding: input_ids go into no lookup in a constant matrix"
        )
    if not heads:
        raise VerificationError("the graph has no head: no product with a constant matrix makes the logits")
    held = {_place(tensor, folder) for tensor in embedding.tensors}
    others = {
        place: tensor.name
        for head in heads
        for tensor in head.tensors
        if not any((place := _place(tensor, folder)).within(one) for one in held)
    }
    return Tie(
        embedding,
        tuple(heads),
        sum(place.length for place in held),
        tuple(others.values()),
        sum(place.length for place in others),
    )


@dataclass(frozen=True)
class _Place:
    """Bytes of a data file; small constants inside the graph have their name for a file."""

    file: Path | str
    offset: int
    length: int

    def within(self, other: _Place) -> bool:
        """Whether all of these bytes are among the other's."""
        return (
            self.file == other.file
            and other.offset <= self.offset
            and self.offset + self.length <= other.offset + other.length
        )


def _place(tensor: onnx.TensorProto, folder: Path) -> _Place:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        at = External.of(tensor, folder)
        return _Place(at.path, at.offset, at.length)
    return _Place(tensor.name, 0, len(tensor.raw_data) or 4 * math.prod(tensor.dims))
