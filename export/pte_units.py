"""The units of a model's program: each one delegate of XNNPACK's, lowered once for all layers alike.

Lowering takes a second per unit and holds its matrices several times, so it is done with stand-ins for the
weights, and every layer of the same types gets a copy of the payload that asks for its own weights. Knows how
modules (pte_layers.py) are lowered, and the keys by which XNNPACK finds data; not files, nor any weight's
value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir.backend.partitioner import PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import nn
from torch.export import Dim, ExportedProgram

from export.pte_layers import First, Last, Matrix, Middle, Types, Vector, Weight
from fox_edge.config import FoxConfig
from fox_edge.errors import FoxEdgeError
from fox_edge.quant import EMBEDDING

# Positions that a unit is traced with; the largest chunk is a bound in the program, not here.
_TRACED = 7


@dataclass(frozen=True)
class Unit:
    """A lowered unit.

    `inputs` and `outputs` say which of the module's arguments and results the delegate's are, in its order.
    `constants` are small data that are the same for every layer: key -> bytes.
    """

    backend: str
    payload: bytes
    compile_specs: list[Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: tuple[Weight, ...]
    constants: dict[str, bytes]

    def renamed(self, rename: Callable[[str], str]) -> Unit:
        """The same unit for other tensors: each asks for its data by keys made of its name."""
        payload, weights = self.payload, []
        for weight in self.weights:
            name = rename(weight.name)
            new = replace(weight, name=name, key=key_of(name), scales_key=None)
            payload = payload.replace(weight.key.encode(), new.key.encode())
            if weight.scales_key is not None:
                new = replace(new, scales_key=key_of(name + ".scales"))
                assert new.scales_key is not None
                payload = payload.replace(weight.scales_key.encode(), new.scales_key.encode())
            weights.append(new)
        return replace(self, payload=payload, weights=tuple(weights))


def key_of(name: str) -> str:
    """A key for data whose digest is not known yet, as long as a digest."""
    return hashlib.sha256(name.encode()).hexdigest()


class UnitMaker:
    """Gives every unit of a model, each kind lowered once. `types` gives a matrix's type by its HF name."""

    def __init__(self, config: FoxConfig, types: Types, scaled_columns: bool) -> None:
        self.config, self.types, self.scaled_columns = config, types, scaled_columns
        self._middle: dict[tuple[str, ...], tuple[int, Unit]] = {}

    def units(self) -> Iterator[Unit]:
        """First, the ones between attentions, last: one more than there are layers."""
        yield self._first().renamed(str)
        for layer in range(1, self.config.num_layers):
            yield self._between(layer)
        yield self._last().renamed(str)

    def _first(self) -> Unit:
        stored = self.config.hidden_size
        type_ = self.types(EMBEDDING).of_row(stored)
        blocks = stored // type_.block_size if type_.bits else 1
        row = stored // 2 if type_.bits == 4 else stored
        module = First(self.config, self.types, self.scaled_columns)
        return _lower(module, (row,), (blocks,), *self._rotary())

    def _between(self, layer: int) -> Unit:
        shapes = self.config.tensor_shapes()
        kind = tuple(
            self.types(name).name
            for name in shapes
            if len(shapes[name]) == 2
            and name.startswith((f"model.layers.{layer - 1}.", f"model.layers.{layer}."))
        )
        if kind not in self._middle:
            module = Middle(self.config, layer, self.types)
            self._middle[kind] = (layer, _lower(module, *self._attended(), *self._rotary()))
        like, unit = self._middle[kind]

        def rename(name: str) -> str:
            for before in (like, like - 1):
                if name.startswith(f"model.layers.{before}."):
                    return name.replace(f".{before}.", f".{before + layer - like}.", 1)
            raise AssertionError(name)

        return unit.renamed(rename)

    def _last(self) -> Unit:
        return _lower(Last(self.config, self.types, self.scaled_columns), *self._attended())

    def _rotary(self) -> tuple[tuple[int, ...], ...]:
        return ((1, self.config.head_dim),) * 2

    def _attended(self) -> tuple[tuple[int, ...], ...]:
        return (self.config.hidden_size,), (self.config.num_heads, self.config.head_dim)


class _OneDelegate(XnnpackPartitioner):
    """XNNPACK's partitioner, but for a module that is to become one delegate as a whole."""

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        found = super().partition(exported_program)
        spec = next(iter(found.partition_tags.values()))
        for node in exported_program.graph.nodes:
            if node.op == "call_function":
                if "delegation_tag" not in node.meta:
                    raise FoxEdgeError(f"this version of ExecuTorch's XNNPACK does not take {node.target}")
                node.meta["delegation_tag"] = "unit"
        tag_constant_data(exported_program)
        return replace(found, partition_tags={"unit": spec})


def _lower(module: nn.Module, *shapes: tuple[int, ...]) -> Unit:
    """Lower a module whose inputs are (1, T, *shape) each."""
    inputs = tuple(torch.zeros(1, _TRACED, *shape) for shape in shapes)
    open_length = tuple({1: Dim.AUTO} for _ in shapes)
    with torch.no_grad():
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=open_length, strict=False)
    edge = to_edge_transform_and_lower(
        program,
        partitioner=[_OneDelegate()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    graph_module = edge.exported_program().graph_module
    nodes = list(graph_module.graph.nodes)
    lowered: LoweredBackendModule = getattr(
        graph_module, _only(n.target for n in nodes if n.op == "get_attr")
    )
    call = _only(n for n in nodes if "delegate" in str(n.target))
    given = edge.exported_program().graph_signature.user_inputs
    results = _only(n for n in nodes if n.op == "output").args[0]
    store = lowered.named_data_store_output
    assert store is not None
    data = {key: store.buffers[entry.buffer_index] for key, entry in store.pte_data.items()}
    weights = tuple(_weights(module))
    for key in _data_keys(weights):
        if data.pop(key, None) is None:
            raise FoxEdgeError("this version of ExecuTorch stores XNNPACK's weights in another layout")
    return Unit(
        backend=lowered.backend_id,
        payload=lowered.processed_bytes,
        compile_specs=lowered.compile_specs,
        inputs=tuple(given.index(node.name) for node in call.args[1:]),
        outputs=tuple(node.args[1] for node in results),
        weights=weights,
        constants={key: bytes(value) for key, value in data.items()},
    )


def _weights(module: nn.Module) -> Iterator[Weight]:
    for part in module.modules():
        if isinstance(part, Vector | Matrix):
            yield part.keys()


def _data_keys(weights: Sequence[Weight]) -> Iterator[str]:
    for weight in weights:
        yield weight.key
        if weight.scales_key is not None:
            yield "scale_" + weight.scales_key


def _only(found: Any) -> Any:
    (one,) = found
    return one
