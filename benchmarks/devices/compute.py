"""The ceiling of reading a prompt: how many operations per second this machine has, and how many are needed.

A prompt is bound by arithmetic as decoding is bound by memory. The machine's rate is the best of several
libraries' matrix products, of several sizes, for each type of number: one library understates a machine, and
another then seems to pass 100 %. What is needed is the least that any runtime could do, so that the share
reached never flatters. Operations are multiplications and additions, each counted.

Knows matrix products and the model's shape; not files, sessions or runtimes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from fox_edge.config import FoxConfig
from fox_edge.processors import available_cores

# Types of numbers, from slow to fast where a processor has instructions for each.
FLOAT32, BF16, INT8 = "float32", "bf16", "int8"
# (rows, inner, columns) of the products: small enough to stay in a cache, large enough to keep threads busy.
_SHAPES = ((256, 1024, 1024), (512, 2048, 2048))
_BLOCK = 256  # inputs that share a scale in a product of quantized weights: the widest, so the fastest

Way: TypeAlias = Callable[[], object]
# What it is called, operations of one call, the call.
_Named: TypeAlias = tuple[str, int, Way]


@dataclass(frozen=True)
class Compute:
    """Operations per second in numbers of a type; `method` is the best way, `methods` are all."""

    type: str
    operations_per_s: float
    method: str
    threads: int
    methods: dict[str, float]
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """As reports carry it."""
        return asdict(self)


def measure_compute(threads: int | None = None, seconds: float = 2.0) -> list[Compute]:
    """The rate of each type of number, with all threads. Takes about `seconds`, whatever the machine."""
    threads = threads or available_cores()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ways = {kind: list(make(threads)) for kind, make in _WAYS.items()}
        share = seconds / sum(map(len, ways.values()))
        return [_measured(kind, threads, found, share) for kind, found in ways.items() if found]
    finally:
        torch.set_num_threads(before)


def best_of(*measured: Sequence[Compute]) -> list[Compute]:
    """Of several measurements the better one of each device and type."""
    found: dict[tuple[str, str], Compute] = {}
    for compute in (one for several in measured for one in several):
        key = (compute.device, compute.type)
        if key not in found or compute.operations_per_s > found[key].operations_per_s:
            found[key] = compute
    return list(found.values())


def ceiling_for(quant: str, computes: Sequence[Compute]) -> Compute | None:
    """The rate that no runtime can pass with weights of these types; None where nothing was measured.

    Wide weights may be multiplied in their own type or a wider one; whatever else may be computed in the
    fastest type that there is, since a runtime may round activations as it likes.
    """
    allowed = _WIDE.get(quant, (FLOAT32, BF16, INT8))
    return max(
        (compute for compute in computes if compute.type in allowed),
        key=lambda compute: compute.operations_per_s,
        default=None,
    )


# Names of unquantized types -> what their products may be computed in.
_WIDE: Mapping[str, tuple[str, ...]] = {
    "float32": (FLOAT32,),
    "f32": (FLOAT32,),
    "bf16": (FLOAT32, BF16),
}


def prompt_operations(config: FoxConfig, tokens: int, past: int = 0) -> int:
    """Operations of reading so many tokens when `past` others are in the cache: the least that will do.

    Two for each weight of the layers' matrices and each token; attention's two products (queries with keys,
    chances with values) of each token with itself and all before it; the head once, for the last token.
    Norms, rotation and softmax are left out: they are thousands of times fewer.
    """
    h, q = config.hidden_size, config.num_heads * config.head_dim
    layer = 2 * q * h + 2 * config.kv_dim * h + 3 * config.intermediate_size * h
    seen = tokens * past + tokens * (tokens + 1) // 2
    return 2 * (config.num_layers * (tokens * layer + 2 * q * seen) + config.vocab_size * h)


def operations_per_token(
    config: FoxConfig, conversations: Sequence[Sequence[int]], decode_tokens: int
) -> float:
    """Operations per prompt token, over conversations of turns of so many tokens, each of them answered.

    An answer of one token and `decode_tokens` more stays in the cache; its last token is read with the next
    turn.
    """
    operations = tokens = 0
    for turns in conversations:
        past = 0
        for number, length in enumerate(turns):
            read = length + (1 if number else 0)
            operations += prompt_operations(config, read, past)
            tokens += read
            past += read + decode_tokens
    return operations / tokens


def prompt_figures(
    row: Mapping[str, Any], operations: float | None, computes: Sequence[Compute]
) -> dict[str, Any]:
    """A row's ceiling for prompts and the share reached; null where `operations` per token are not known."""
    ceiling = ceiling_for(row["quant"], computes)
    most = None if operations is None or ceiling is None else ceiling.operations_per_s / operations
    reached = row.get("prompt_tokens_per_s")
    return {
        "prompt_operations_per_token": operations,
        "prompt_ceiling_tokens_per_s": most,
        "prompt_roofline_percent": None if most is None or reached is None else 100 * reached / most,
    }


# --- ways ------------------------------------------------------------------------------------------------


def _float32_ways(threads: int) -> Iterator[_Named]:
    for m, k, n in _SHAPES:
        a, b = torch.randn(m, k), torch.randn(k, n)
        yield "torch", 2 * m * k * n, partial(torch.mm, a, b)
        if threads >= available_cores():  # numpy's library takes all that there are
            yield "numpy", 2 * m * k * n, partial(np.matmul, a.numpy(), b.numpy())
    with contextlib.suppress(ImportError):
        yield from _onnxruntime_ways("float32", threads)


def _bf16_ways(_threads: int) -> Iterator[_Named]:
    for m, k, n in _SHAPES:
        a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        yield "torch", 2 * m * k * n, partial(torch.nn.functional.linear, a, b)


def _int8_ways(threads: int) -> Iterator[_Named]:
    for m, k, n in _SHAPES:
        a, b = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((m, k), (k, n)))
        with contextlib.suppress(RuntimeError, AttributeError):  # a PyTorch without it
            torch._int_mm(a, b)
            yield "torch", 2 * m * k * n, partial(torch._int_mm, a, b)
    with contextlib.suppress(ImportError):
        # Activations are rounded to int8, whatever the weights are stored as.
        for kind in ("8-bit weights", "4-bit weights", "integers"):
            yield from _onnxruntime_ways(kind, threads)


def _onnxruntime_ways(kind: str, threads: int) -> Iterator[_Named]:
    """Products with weights of a kind ('integers': activations are some too); raises ImportError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    rng = np.random.default_rng(0)
    for m, k, n in _SHAPES:
        numbers = rng.standard_normal((m, k), np.float32)
        activations = (128 + 40 * numbers).astype(np.uint8) if kind == "integers" else numbers
        session = onnxruntime.InferenceSession(
            _product(kind, k, n), options, providers=["CPUExecutionProvider"]
        )
        yield f"onnxruntime, {kind}", 2 * m * k * n, partial(session.run, None, {"a": activations})


def _product(kind: str, k: int, n: int) -> bytes:
    """An ONNX model that multiplies rows of k numbers with a (k, n) matrix of a kind."""
    from onnx import TensorProto, helper, numpy_helper

    node, constants = _node(kind, k, n)
    integers = kind == "integers"
    given, made = (TensorProto.UINT8, TensorProto.INT32) if integers else (TensorProto.FLOAT,) * 2
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("a", given, ["m", k])],
        [helper.make_tensor_value_info("y", made, ["m", n])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def _node(kind: str, k: int, n: int) -> tuple[Any, dict[str, Any]]:
    """The operator, and the constants that it multiplies with."""
    from onnx import helper

    rng = np.random.default_rng(0)
    if kind == "float32":
        return helper.make_node("MatMul", ["a", "b"], ["y"]), {"b": rng.standard_normal((k, n), np.float32)}
    if kind == "integers":
        return helper.make_node("MatMulInteger", ["a", "b"], ["y"]), {
            "b": rng.integers(-127, 128, (k, n), np.int8)
        }
    bits, blocks = int(kind[0]), k // _BLOCK
    settings = {"K": k, "N": n, "bits": bits, "block_size": _BLOCK, "accuracy_level": 4}
    return helper.make_node("MatMulNBits", ["a", "b", "s"], ["y"], domain="com.microsoft", **settings), {
        "b": rng.integers(0, 256, (n, blocks, _BLOCK * bits // 8), np.uint8),
        "s": np.full(n * blocks, 0.01, np.float32),
    }


_WAYS: Mapping[str, Callable[[int], Iterator[_Named]]] = {
    FLOAT32: _float32_ways,
    BF16: _bf16_ways,
    INT8: _int8_ways,
}


def _measured(kind: str, threads: int, ways: Sequence[_Named], seconds: float) -> Compute:
    methods: dict[str, float] = {}
    for name, operations, way in ways:
        methods[name] = max(methods.get(name, 0.0), _best(way, operations, seconds))
    method = max(methods, key=lambda name: methods[name])
    return Compute(kind, methods[method], method, threads, methods)


def _best(way: Way, operations: int, seconds: float) -> float:
    """Operations per second of the fastest run within the time given; the first one does not count."""
    way()
    best, deadline = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        way()
        end = time.perf_counter()
        best = max(best, operations / (end - start))
        if end > deadline:
            return best
