"""The units and attentions of a model put together to an ExecuTorch program, without its weights.

Two methods on one KV cache: `forward` gives the last row of logits, which is what ExecuTorch's own runners
for phones ask for; `score` gives all rows, for those who compare. What the runners ask of a program besides,
they find as methods that answer with a constant. Knows the order of operators and torch.export; not what a
unit computes, nor where weights lie (pte_file.py).

Shapes: T new positions, S cached positions, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import executorch.extension.llm.custom_ops.custom_ops  # registers torch.ops.llama
import executorch.kernels.quantized  # noqa: F401  registers what quantizes keys and values
import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize.data_serializer import DataEntry
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule as _LoweredBackendModule
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn
from torch.export import Dim

from export.pte import CHUNK, FORWARD, INT8, SCORE, SCORE_CHUNK
from export.pte_units import Unit
from fox_edge.config import FoxConfig
from fox_edge.model import rotary_tables
from fox_edge.quant import QuantType

# XNNPACK maps data at multiples of this.
_DATA_ALIGNMENT = 16
# Rows of the stand-ins for the embedding's table, and what fills them: found again in the program by this.
_STAND_IN_ROWS, _TABLE_FILL, _SCALES_FILL = 3, 0xA5, 3.0


def build_program(
    config: FoxConfig,
    units: Sequence[Unit],
    embedding: QuantType,
    *,
    context: int,
    kv: str,
    answers: dict[str, Any],
) -> bytes:
    """A whole .pte in which every weight is a stand-in of a few bytes; `answers` become constant methods."""
    programs = {}
    for name, chunk in ((FORWARD, CHUNK), (SCORE, SCORE_CHUNK)):
        chunk = min(chunk, context)
        module = _Whole(config, units, embedding, context, kv, all_rows=name == SCORE).eval()
        inputs = (torch.zeros(1, max(2, chunk - 1), dtype=torch.long), torch.zeros(1, dtype=torch.long))
        shapes = ({1: Dim("positions", min=1, max=chunk)}, None)
        with torch.no_grad():
            programs[name] = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    edge = to_edge(
        programs,
        constant_methods=answers,
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    whole = edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            emit_mutable_buffer_names=True,
            memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True),
        )
    )
    return bytes(whole.buffer)


class LoweredBackendModule(_LoweredBackendModule):
    """A delegate that tells the shapes of its results by a function, not by its graph of a hundred nodes.

    torch tells a delegate by its class's name, hence the name.
    """

    def __init__(self, unit: Unit, shapes: Callable[..., tuple[Tensor, ...]]) -> None:
        data = {weight.key: weight.key.encode() for weight in unit.weights}
        scales = (weight.scales_key for weight in unit.weights if weight.scales_key is not None)
        data |= {f"scale_{key}": key.encode() for key in scales}
        data |= unit.constants
        entries = {key: DataEntry(n, _DATA_ALIGNMENT, None) for n, key in enumerate(data)}
        store = NamedDataStoreOutput(list(data.values()), entries, {})
        program: Any = _Shapes(shapes, len(unit.outputs))
        super().__init__(program, unit.backend, unit.payload, unit.compile_specs, store)
        self.unit, self.shapes = unit, shapes

    def __deepcopy__(self, memo: dict[int, Any] | None) -> LoweredBackendModule:
        copied = LoweredBackendModule(self.unit, self.shapes)
        copied.meta = dict(self.meta or {})
        return copied


class _Shapes:
    """All that is asked of a delegate's original program here; its graph is asked how many results it has."""

    def __init__(self, shapes: Callable[..., tuple[Tensor, ...]], results: int) -> None:
        self._shapes, self.graph = shapes, torch.fx.Graph()
        self.graph.output((None,) * results)

    def module(self) -> Callable[..., tuple[Tensor, ...]]:
        return self._shapes


class _Delegated(nn.Module):
    """A unit as a module."""

    def __init__(self, unit: Unit, shapes: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.inputs, self.outputs = unit.inputs, unit.outputs
        first = unit.inputs.index(0)

        def results(*args: Tensor) -> tuple[Tensor, ...]:
            found = shapes(args[first])
            order = sorted(range(len(found)), key=lambda n: unit.outputs[n])
            return tuple(found[n] for n in order)

        self.lowered = LoweredBackendModule(unit, results)

    def forward(self, *args: Tensor) -> list[Tensor]:
        results = executorch_call_delegate(self.lowered, *(args[n] for n in self.inputs))
        return [results[n] for n in self.outputs]


class _Cache(nn.Module):
    """Keys and values of one layer, and attention to them: q (1, T, H, D), k and v (1, T, K, D).

    ExecuTorch's attention reads a key/value head once for every query head that has it. Where `grouped`, the
    query heads of a lone token are given to it as if they were tokens of one head, so that they read it
    together: in a long conversation that is most of what a token reads.
    """

    def __init__(self, config: FoxConfig, context: int, kv: str, *, grouped: bool) -> None:
        super().__init__()
        self.integers, self.grouped = kv == INT8, grouped
        self.kv_heads, self.group = config.num_kv_heads, config.num_heads // config.num_kv_heads
        shape = (1, context, config.num_kv_heads, config.head_dim)
        for name in ("k", "v"):
            dtype = torch.int8 if self.integers else torch.float32
            self.register_buffer(f"{name}_cache", torch.zeros(shape, dtype=dtype))
            if self.integers:
                self.register_buffer(f"{name}_scales", torch.zeros(*shape[:-1], 1))
                self.register_buffer(f"{name}_zeros", torch.zeros(*shape[:-1], 1, dtype=torch.int8))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, alone: Tensor) -> Tensor:
        """What is attended, (1, T, H, D). `alone` says whether there is one token, and room for its group."""
        position: int = input_pos[-1].item()
        torch._check(position >= 0)
        queries: tuple[Tensor, ...] = (q,)
        cache: tuple[Tensor, ...] = (self.k_cache, self.v_cache)
        for name, new in (("k", k), ("v", v)):
            # In int8 every head of every position has a scale and a zero point.
            parts = _to_int8(new) if self.integers else (new,)
            for part, value in zip(("cache", "scales", "zeros"), parts, strict=False):
                torch.ops.llama.update_cache(value, getattr(self, f"{name}_{part}"), position)
        if self.integers:
            queries = _to_int8(q)
            cache = (*cache, self.k_zeros, self.k_scales, self.v_zeros, self.v_scales)
        if not self.grouped:
            return _attend(position, queries, cache)
        found: Tensor = torch.cond(alone, self._alone, _all_tokens, (input_pos, queries, cache))
        return found

    def _alone(self, input_pos: Tensor, queries: tuple[Tensor, ...], cache: tuple[Tensor, ...]) -> Tensor:
        """Attention of one token: as many tokens as a group has heads, without a mask, end where it is."""
        shape = (1, self.kv_heads, self.group, -1)
        grouped = tuple(x[:, :1].reshape(shape).transpose(1, 2).contiguous() for x in queries)
        position: int = input_pos[-1].item()
        torch._check(position >= self.group - 1)
        found = _attend(position - self.group + 1, grouped, cache, causal=False)
        together = found.transpose(1, 2).reshape(1, 1, self.kv_heads * self.group, -1)
        return together.expand(queries[0].shape).clone()  # of the other branch's shape: T is 1


def _all_tokens(input_pos: Tensor, queries: tuple[Tensor, ...], cache: tuple[Tensor, ...]) -> Tensor:
    """Attention of any number of tokens, each to those up to its own."""
    position: int = input_pos[-1].item()
    torch._check(position >= 0)
    return _attend(position, queries, cache)


def _attend(
    position: int, queries: tuple[Tensor, ...], cache: tuple[Tensor, ...], *, causal: bool = True
) -> Tensor:
    """ExecuTorch's attention: numbers, or integers with their scales and zero points."""
    keys, values, *how = cache
    query, *its = queries
    found: Tensor
    if not how:
        found = torch.ops.llama.custom_sdpa(query, keys, values, position, None, 0.0, causal)
        return found
    scales, zeros = its
    attend = torch.ops.llama.custom_quantized_sdpa
    found = attend(query, keys, values, position, None, 0.0, causal, None, zeros, scales, *how)
    return found


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales (float32) and zero points (int8) of the last dimension."""
    ops = torch.ops.quantized_decomposed
    scales, zeros = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    integers = ops.quantize_per_token(x, scales, zeros, -128, 127, torch.int8)
    return integers, scales.float(), zeros.to(torch.int8)


class _Whole(nn.Module):
    """tokens (1, T), input_pos (1,) -> logits: (1, V) of the last position, or (1, T, V) with `all_rows`."""

    def __init__(
        self,
        config: FoxConfig,
        units: Sequence[Unit],
        embedding: QuantType,
        context: int,
        kv: str,
        *,
        all_rows: bool,
    ) -> None:
        super().__init__()
        self.context, self.all_rows = context, all_rows
        self.group = config.num_heads // config.num_kv_heads
        # Whoever scores gives many tokens; a program with both ways takes the exporter twice as long.
        grouped = self.group > 1 and not all_rows
        self.first = _Delegated(units[0], lambda stored: _hidden(config, stored.shape[1]))
        self.middle = nn.ModuleList(
            _Delegated(unit, lambda x: _hidden(config, x.shape[1])) for unit in units[1:-1]
        )
        self.last = _Delegated(units[-1], lambda x: (torch.empty(1, x.shape[1], config.vocab_size),))
        self.caches = nn.ModuleList(
            _Cache(config, context, kv, grouped=grouped) for _ in range(config.num_layers)
        )
        for name, table in _stand_ins(config, embedding).items():
            self.register_buffer(name, table)
        cos, sin = rotary_tables(config, torch.arange(context))
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.table: Tensor
        self.scales: Tensor
        self.cos: Tensor
        self.sin: Tensor

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        length = tokens.shape[1]
        position: int = input_pos[-1].item()
        torch._check(position >= 0)
        torch._check(position + length <= self.context)
        turns = [self._turn(table, position, length) for table in (self.cos, self.sin)]
        stored, scales = F.embedding(tokens, self.table).float(), F.embedding(tokens, self.scales).float()
        alone = (torch.scalar_tensor(length) == 1) & (input_pos[-1] >= self.group - 1)
        x, q, k, v = self.first(stored, scales, *turns)
        for cache, unit in zip(self.caches, self.middle, strict=False):
            x, q, k, v = unit(x, cache(q, k, v, input_pos, alone), *turns)
        y = self.caches[-1](q, k, v, input_pos, alone)
        if self.all_rows:
            return self.last(x, y)[0]
        logits: Tensor = self.last(x[:, -1:], y[:, -1:])[0]
        return logits[:, 0]

    def _turn(self, table: Tensor, position: int, length: int) -> Tensor:
        """Cosines or sines (1, T, 1, D) of the new positions."""
        half = table.narrow(0, position, length)
        return torch.cat((half, half), -1)[None, :, None]


def _hidden(config: FoxConfig, length: int) -> tuple[Tensor, ...]:
    """Shapes of hidden states and of what an attention reads."""
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    shapes = ((config.hidden_size,), (heads, size), (kv_heads, size), (kv_heads, size))
    return tuple(torch.empty(1, length, *shape) for shape in shapes)


def fills(config: FoxConfig, type_: QuantType) -> tuple[bytes, bytes]:
    """One element of the stand-in for the embedding's table, and of that for its scales."""
    table, scales = (t.view(-1)[:1].view(torch.uint8) for t in _stand_ins(config, type_).values())
    return table.numpy().tobytes(), scales.numpy().tobytes()


def _stand_ins(config: FoxConfig, type_: QuantType) -> dict[str, Tensor]:
    """The embedding's table and scales, in the types of the file, but of a few rows."""
    columns, type_ = config.hidden_size, type_.of_row(config.hidden_size)
    if not type_.bits:
        table = torch.full((_STAND_IN_ROWS, columns), _TABLE_FILL, dtype=torch.float32)
        return {"table": table, "scales": torch.full((_STAND_IN_ROWS, 1), _SCALES_FILL)}
    blocks = columns // type_.block_size
    if type_.bits == 4:
        table = torch.full((_STAND_IN_ROWS, columns // 2), _TABLE_FILL, dtype=torch.uint8)
        return {
            "table": table,
            "scales": torch.full((_STAND_IN_ROWS, blocks), _SCALES_FILL, dtype=torch.bfloat16),
        }
    table = torch.full((_STAND_IN_ROWS, columns), _TABLE_FILL - 256, dtype=torch.int8)
    return {"table": table, "scales": torch.full((_STAND_IN_ROWS, 1), _SCALES_FILL)}
