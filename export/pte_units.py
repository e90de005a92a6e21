"""What XNNPACK computes between two attentions: written in PyTorch, lowered once for all layers alike.

A decoder without its attentions falls into units: from the embedding's rows to the first attention, from one
attention to the next, from the last one to the logits. Each is one delegate. Lowering takes a second per unit
and holds its matrices several times, so it is done with stand-ins for the weights, of the real shape but all
zeros, and every layer of the same types gets a copy of the payload that asks for its own weights. Knows
operators, shapes and the keys by which XNNPACK finds data; not files, nor any weight's value.

Shapes: T new positions, C hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir.backend.partitioner import PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from fox_edge.config import FoxConfig
from fox_edge.errors import FoxEdgeError
from fox_edge.quant import EMBEDDING, HEAD, QuantType

# Positions that a unit is traced with; the largest chunk is a bound in the program, not here.
_TRACED = 7
_INT8 = (torch.int8, -128, 127)
# XNNPACK reads two 4-bit integers from a byte, the first from the low half, each 8 above its value.
_ZEROS = {4: b"\x88", 8: b"\0"}

# What a unit is made for: the HF name of a matrix -> its type.
Types = Callable[[str], QuantType]


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint in a unit's payload, and the keys that ask for its data."""

    name: str
    key: str
    scales_key: str | None


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


# --- the modules -----------------------------------------------------------------------------------------


class _Vector(nn.Module):
    """Weights of one dimension (C,), named as in the checkpoint."""

    def __init__(self, name: str, columns: int, number: int) -> None:
        super().__init__()
        self.name = name
        # Stand-ins differ in their first value, so that the data of no two have the same digest.
        self.register_buffer("weight", torch.ones(columns))
        self.weight: Tensor
        self.weight[0] = number + 2

    def keys(self) -> Weight:
        return Weight(self.name, hashlib.sha256(self.weight.numpy().tobytes()).hexdigest(), None)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class _Matrix(nn.Module):
    """Weights (N, C) and, where they are integers, a scale for each block of them."""

    def __init__(self, name: str, rows: int, columns: int, type_: QuantType, number: int) -> None:
        super().__init__()
        self.name, self.type = name, type_.of_row(columns)
        dtype = torch.int8 if type_.bits else torch.float32
        weight = torch.zeros(rows, columns, dtype=dtype)
        weight[0, :2] = torch.tensor([number // 8, number % 8], dtype=dtype)
        self.register_buffer("weight", weight)
        self.weight: Tensor
        if type_.bits:
            scales = torch.ones(rows, columns // self.type.block_size)
            scales[0, 0] += number / 128  # exact in bfloat16
            self.register_buffer("scales", scales)
            self.register_buffer("zeros", torch.zeros_like(scales, dtype=torch.int8))
        self.scales: Tensor
        self.zeros: Tensor

    def keys(self) -> Weight:
        """The digests of the stand-ins as XNNPACK stores them, which is how it names data."""
        if not self.type.bits:
            return Weight(self.name, hashlib.sha256(self.weight.numpy().tobytes()).hexdigest(), None)
        digits = self.weight[0, :2].tolist()
        first = bytes([digits[0] + 8 | digits[1] + 8 << 4]) if self.type.bits == 4 else bytes(digits)
        size = self.weight.numel() * self.type.bits // 8
        stored = self.scales if self.type.bits == 8 else self.scales.bfloat16().view(torch.int16)
        scales_key = hashlib.sha256(stored.numpy().tobytes()).hexdigest()
        return Weight(self.name, _digest(first, _ZEROS[self.type.bits], size), scales_key)

    def forward(self, x: _Input) -> Tensor:
        if not self.type.bits:
            return F.linear(x.exact, self.weight)
        low = -(2 ** (self.type.bits - 1))
        block = [1, self.type.block_size]
        weight = dequantize_affine(self.weight, block, self.scales, self.zeros, torch.int8, low, -low - 1)
        return F.linear(x.rounded, weight)


class _Input:
    """What several matrices read: rounded to int8 by row where their integers want it, at most once."""

    def __init__(self, x: Tensor, *readers: _Matrix) -> None:
        self.exact = x
        if any(reader.type.bits for reader in readers):
            self.rounded = _through_int8(x)


def _through_int8(x: Tensor) -> Tensor:
    """Rows (1, T, C) rounded to int8, each with its own scale and zero point, as XNNPACK's kernels read."""
    block = [1, 1, x.shape[-1]]
    scale, zero = choose_qparams_affine(x, MappingType.ASYMMETRIC, block, *_INT8, zero_point_dtype=torch.int8)
    return dequantize_affine(quantize_affine(x, block, scale, zero, *_INT8), block, scale, zero, *_INT8)


class _Norm(nn.Module):
    """RMSNorm; the mean of squares is a product, since XNNPACK has no mean over the last dimension."""

    def __init__(self, name: str, config: FoxConfig, number: int) -> None:
        super().__init__()
        columns = config.hidden_size
        self.scale = _Vector(name, columns, number)
        self.register_buffer("mean", torch.full((1, columns), 1 / columns))
        self.register_buffer("eps", torch.tensor([config.rms_norm_eps]))
        self.mean: Tensor
        self.eps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.scale(x * torch.rsqrt(F.linear(x * x, self.mean) + self.eps))
        return result


class _Before(nn.Module):
    """A layer up to its attention: (1, T, C) -> q (1, T, H, D), k and v (1, T, K, D)."""

    def __init__(self, config: FoxConfig, layer: int, types: Types) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        prefix, columns = f"model.layers.{layer}.", config.hidden_size
        self.norm = _Norm(f"{prefix}input_layernorm.weight", config, 1)

        def matrix(part: str, rows: int, number: int) -> _Matrix:
            name = f"{prefix}self_attn.{part}_proj.weight"
            return _Matrix(name, rows, columns, types(name), number)

        self.q = matrix("q", self.heads * self.head_dim, 2)
        self.k = matrix("k", config.kv_dim, 3)
        self.v = matrix("v", config.kv_dim, 4)
        half = torch.eye(self.head_dim // 2)
        none = torch.zeros_like(half)
        turn = torch.cat((torch.cat((none, -half), 1), torch.cat((half, none), 1)))
        self.register_buffer("turn", turn)
        self.turn: Tensor

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = _Input(self.norm(x), self.q, self.k, self.v)
        q = self.q(h).view(1, -1, self.heads, self.head_dim)
        k = self.k(h).view(1, -1, self.kv_heads, self.head_dim)
        v = self.v(h).view(1, -1, self.kv_heads, self.head_dim)
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin), v

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As model.rotate. XNNPACK cannot cut a tensor of open length in two: a product swaps the halves."""
        return x * cos + F.linear(x, self.turn) * sin


class _Behind(nn.Module):
    """A layer from its attention on: x (1, T, C), y (1, T, H, D) -> (1, T, C)."""

    def __init__(self, config: FoxConfig, layer: int, types: Types) -> None:
        super().__init__()
        prefix, columns, inner = f"model.layers.{layer}.", config.hidden_size, config.intermediate_size

        def matrix(part: str, rows: int, columns: int, number: int) -> _Matrix:
            name = f"{prefix}{part}_proj.weight"
            return _Matrix(name, rows, columns, types(name), number)

        self.attended = config.num_heads * config.head_dim
        self.o = matrix("self_attn.o", columns, self.attended, 5)
        self.norm = _Norm(f"{prefix}post_attention_layernorm.weight", config, 6)
        self.gate = matrix("mlp.gate", inner, columns, 7)
        self.up = matrix("mlp.up", inner, columns, 8)
        self.down = matrix("mlp.down", columns, inner, 9)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.o(_Input(y.view(1, -1, self.attended), self.o))
        h = _Input(self.norm(x), self.gate, self.up)
        gate = self.gate(h)
        inner = gate * torch.sigmoid(gate) * self.up(h)
        result: Tensor = x + self.down(_Input(inner, self.down))
        return result


class _Lookup(nn.Module):
    """Rows of the embedding as they lie in the file, as float32, to hidden states (1, T, C)."""

    def __init__(self, config: FoxConfig, type_: QuantType, scaled_columns: bool) -> None:
        super().__init__()
        self.columns, self.type = config.hidden_size, type_.of_row(config.hidden_size)
        for name, value in (("one", 1.0), ("sixteenth", 1 / 16), ("sixteen", 16.0), ("eight", 8.0)):
            self.register_buffer(name, torch.tensor([value]))
        self.one: Tensor
        self.sixteenth: Tensor
        self.sixteen: Tensor
        self.eight: Tensor
        self.column_scales = _Vector(COLUMN_SCALES, self.columns, 10) if scaled_columns else nn.Identity()

    def forward(self, stored: Tensor, scales: Tensor) -> Tensor:
        x = stored
        if self.type.bits == 4:
            high = torch.floor(stored * self.sixteenth)
            low = stored - high * self.sixteen
            pairs = [half.view(1, -1, self.columns // 2, 1) for half in (low, high)]
            x = (torch.cat(pairs, -1) - self.eight).view(1, -1, self.columns)
        if self.type.bits:
            blocks = self.columns // self.type.block_size
            x = x.view(1, -1, blocks, self.type.block_size) * scales.view(1, -1, blocks, 1)
            x = x.view(1, -1, self.columns)
        else:
            x = x * self.one  # a delegate does not pass an input on
        result: Tensor = self.column_scales(x)
        return result


# The factors of an embedding's columns: no tensor of the checkpoint.
COLUMN_SCALES = f"{EMBEDDING}.column_scales"


class _First(nn.Module):
    """From the embedding's rows to the first attention."""

    def __init__(self, config: FoxConfig, types: Types, scaled_columns: bool) -> None:
        super().__init__()
        self.lookup = _Lookup(config, types(EMBEDDING), scaled_columns)
        self.before = _Before(config, 0, types)

    def forward(self, stored: Tensor, scales: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        x = self.lookup(stored, scales)
        return x, *self.before(x, cos, sin)


class _Middle(nn.Module):
    """From the attention before a layer to this layer's own."""

    def __init__(self, config: FoxConfig, layer: int, types: Types) -> None:
        super().__init__()
        self.behind, self.before = _Behind(config, layer - 1, types), _Before(config, layer, types)

    def forward(self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        x = self.behind(x, y)
        return x, *self.before(x, cos, sin)


class _Last(nn.Module):
    """From the last attention to logits (1, T, V)."""

    def __init__(self, config: FoxConfig, types: Types, scaled_columns: bool) -> None:
        super().__init__()
        name = EMBEDDING if config.tied else HEAD
        self.behind = _Behind(config, config.num_layers - 1, types)
        self.norm = _Norm("model.norm.weight", config, 11)
        columns = config.hidden_size
        self.column_scales = _Vector(COLUMN_SCALES, columns, 10) if scaled_columns else nn.Identity()
        self.head = _Matrix(name, config.vocab_size, columns, types(name), 12)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        h = self.column_scales(self.norm(self.behind(x, y)))
        return (self.head(_Input(h, self.head)),)


# --- lowering --------------------------------------------------------------------------------------------


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
        module = _First(self.config, self.types, self.scaled_columns)
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
            module = _Middle(self.config, layer, self.types)
            self._middle[kind] = (layer, _lower(module, *self._attended(), *self._rotary()))
        like, unit = self._middle[kind]

        def rename(name: str) -> str:
            for before in (like, like - 1):
                if name.startswith(f"model.layers.{before}."):
                    return name.replace(f".{before}.", f".{before + layer - like}.", 1)
            raise AssertionError(name)

        return unit.renamed(rename)

    def _last(self) -> Unit:
        return _lower(_Last(self.config, self.types, self.scaled_columns), *self._attended())

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
        if isinstance(part, _Vector | _Matrix):
            yield part.keys()


def _data_keys(weights: Sequence[Weight]) -> Iterator[str]:
    for weight in weights:
        yield weight.key
        if weight.scales_key is not None:
            yield "scale_" + weight.scales_key


def _only(found: Any) -> Any:
    (one,) = found
    return one


def _digest(first: bytes, rest: bytes, size: int) -> str:
    """sha256 of `size` bytes that begin with `first` and go on with one byte over and over."""
    digest = hashlib.sha256(first)
    left, piece = size - len(first), rest * (1 << 20)
    while left:
        digest.update(piece[:left])
        left -= min(left, len(piece))
    return digest.hexdigest()
