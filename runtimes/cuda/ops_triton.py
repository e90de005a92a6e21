"""The operations of a decode step as Triton kernels: how many programs, of what size, on which tensors.

Same signatures as ops_torch.py. Allocates results and partial sums with torch.empty only, so a step can be
captured once it has run; waits for nothing. Tensors on the CPU are taken under Triton's interpreter. What is
computed is in the kernels' files; which of them runs, in ops_choices.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from runtimes.cuda import kernels, kernels_attention, kernels_rows, kernels_tiles, ops_choices
from runtimes.cuda.ops_choices import Choice, Library, Rows, Tiles
from runtimes.cuda.ops_matrix import Dense, Matrix, Packed

_ENDS = {
    "norm_linear": kernels.PLAIN.value,
    "head": kernels.PLAIN.value,
    "linear_add": kernels.ADD.value,
    "norm_gate_up": kernels.GATE.value,
}
# The bits of 128.0 and 256.0 as float32; see `kernels.nibble`.
_EXPONENTS = {4: 0x43000000, 8: 0x43800000}
# Columns that a program multiplies before it sums, and that the small kernels take at a time.
_CHUNK, _PIECE = 4096, 1024
# Positions of a tile of attention, splits weighed at a time, rows and columns that tl.dot takes at least.
_POSITIONS, _TOGETHER, _LEAST = 64, 16, 16

# Of each KV cache, by address, batch and heads. Zeros at rest: good for a later cache at that address too.
_counters: dict[tuple[torch.device, int, int, int], Tensor] = {}


def embed(matrix: Matrix, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Token ids (B,) -> their rows (B, C)."""
    C = matrix.columns
    out = torch.empty((len(tokens), C), dtype=dtype, device=tokens.device)
    grid = (len(tokens), triton.cdiv(C, _PIECE))
    kind: dict[str, Any] = {"C": C, "BLOCK": _PIECE, **_launch(ops_choices.uses_pdl())}
    if isinstance(matrix, Dense):
        kernels.embed_dense[grid](tokens, matrix.weight, out, **kind)
    else:
        stored, form = _packed(matrix)
        kernels.embed_packed[grid](tokens, *stored, out, **form, **kind)
    return out


def norm_linear(x: Tensor, norm: Tensor, eps: float, matrix: Matrix) -> Tensor:
    """(B, C) -> (B, N): RMSNorm, then the product."""
    return _product("norm_linear", x, matrix, norm, eps, None)


def linear_add(x: Tensor, matrix: Matrix, residual: Tensor) -> None:
    """Add the product of (B, K) with a matrix to the residual (B, N), in place."""
    _product("linear_add", x, matrix, None, 0.0, residual)


def norm_gate_up(x: Tensor, norm: Tensor, eps: float, matrix: Matrix) -> Tensor:
    """(B, C) -> (B, F): silu(gate) * up of the normalized x; the matrix holds gate's F rows, then up's."""
    return _product("norm_gate_up", x, matrix, norm, eps, None)


def head(x: Tensor, norm: Tensor, eps: float, matrix: Matrix) -> Tensor:
    """(B, C) -> logits (B, V), float32."""
    return _product("head", x, matrix, norm, eps, None)


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """One new position of each conversation: (B, (H + 2K) * D) -> (B, H * D); see ops_torch.py."""
    B = len(qkv)
    _, K, S, D = keys.shape
    H = qkv.shape[1] // D - 2 * K
    length = split_length(B)
    splits = triton.cdiv(S, length)
    out = torch.empty((B, H * D), dtype=qkv.dtype, device=qkv.device)
    partial = weights = counters = out  # of one split, never touched
    if splits > 1:
        partial = torch.empty((B, H, splits, D), dtype=torch.float32, device=qkv.device)
        weights = torch.empty((B, H, splits, 2), dtype=torch.float32, device=qkv.device)
        counters = _counters_of(keys, B)
    kernels_attention.attend[(B, K, splits)](
        qkv, keys, values, slots, positions, cos, sin, out, partial, weights, counters, S,
        D**-0.5 * kernels_attention.LOG2_E.value,
        H=H, K=K, D=D, DP=max(_LEAST, _power(D)), G=max(_LEAST, _power(H // K)), HEADS=_power(H // K),
        LENGTH=length, TILE=_POSITIONS, TOGETHER=min(_TOGETHER, _power(splits)), SPLITS=splits,
        num_warps=4, num_stages=1 if length == _POSITIONS else 3, **_launch(ops_choices.uses_pdl()),
    )  # fmt: skip
    return out


def split_length(batch: int) -> int:
    """Positions of one split: short where few conversations have to keep 132 multiprocessors busy."""
    return _POSITIONS if batch <= 4 else 2 * _POSITIONS if batch <= 16 else 4 * _POSITIONS


def _counters_of(keys: Tensor, batch: int) -> Tensor:
    """Zeros (B, K) that the steps over one KV cache share: it never takes two steps of a size at a time.

    They are made by the first step, which therefore must not be one that is being captured.
    """
    key = (keys.device, keys.untyped_storage().data_ptr(), batch, keys.shape[1])
    if key not in _counters:
        if keys.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"attend: a step of {batch} conversations is captured before one has run")
        _counters[key] = torch.zeros((batch, keys.shape[1]), dtype=torch.int32, device=keys.device)
    return _counters[key]


def dequantize(matrix: Matrix, out: Tensor) -> Tensor:
    """Write the values of a matrix to (N, C), in its type."""
    if isinstance(matrix, Dense):
        return out.copy_(matrix.weight)
    rows, block = 4, max(matrix.block, min(_PIECE, _power(matrix.columns)))
    stored, form = _packed(matrix)
    grid = (triton.cdiv(matrix.rows, rows), triton.cdiv(matrix.columns, block))
    kernels.dequantize_packed[grid](*stored, out, matrix.rows, C=matrix.columns, BLOCK=block, R=rows, **form)
    return out


def tune(name: str, matrices: Sequence[Matrix], batch: int, dtype: torch.dtype) -> dict[Choice, float]:
    """Time the ways to run an operation with these matrices, and keep the quickest; see ops_choices.py.

    A recipe may give layers different types: each finds its own way. Returns the seconds of one product by
    each way, of the first type. For CUDA devices only.
    """
    alike: dict[ops_choices.Key, list[Matrix]] = {}
    for matrix in matrices:
        alike.setdefault(ops_choices.key_of(name, matrix, batch), []).append(matrix)
    found = [_tune(key, some, batch, dtype) for key, some in alike.items()]
    return found[0]


def _tune(
    key: ops_choices.Key, matrices: Sequence[Matrix], batch: int, dtype: torch.dtype
) -> dict[Choice, float]:
    """The same for matrices of one type."""
    name, first = key.name, matrices[0]
    x, norm, residual = _random_inputs(name, first, batch, dtype)
    scratch = None if residual is None else residual.clone()  # what is timed adds to it

    def run(choice: Choice) -> Tensor:
        return _run(choice, name, x, first, norm, 1e-5, None if residual is None else residual.clone())

    def time(choice: Choice) -> float:
        return _seconds(lambda matrix: _run(choice, name, x, matrix, norm, 1e-5, scratch), matrices)

    failures = (RuntimeError, triton.TritonError)
    return ops_choices.tune(key, ops_choices.candidates(name, first, batch), run, time, failures)


def times(name: str, matrices: Sequence[Matrix], batch: int, dtype: torch.dtype) -> dict[Choice, float]:
    """Seconds of one product by each kernel that could run it: where ops_choices.FEW and MANY should be."""
    first = matrices[0]
    x, norm, residual = _random_inputs(name, first, batch, dtype)

    def time(choice: Choice) -> float:
        return _seconds(lambda matrix: _run(choice, name, x, matrix, norm, 1e-5, residual), matrices)

    return {choice: time(choice) for choice in ops_choices.of_each_kind(name, first, batch)}


def _seconds(run: Callable[[Matrix], Any], matrices: Sequence[Matrix]) -> float:
    """Median seconds of one product, the matrices taken one after the other in a captured graph.

    All layers' matrices together do not fit into the cache, so they are read from memory, as in a step.
    """

    def step() -> None:
        for matrix in matrices:
            run(matrix)

    step()  # compiled before anything is captured
    torch.cuda.synchronize()
    milliseconds: float = triton.testing.do_bench_cudagraph(step, rep=20, return_mode="median")
    return milliseconds / 1000 / len(matrices)


def _random_inputs(
    name: str, matrix: Matrix, batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x; the norm's weights and the residual, where there are any. The same in every process."""
    device = matrix.weight.device if isinstance(matrix, Dense) else matrix.integers.device
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).to(dtype)

    x = normal(batch, matrix.columns)
    if name == "linear_add":
        return x, None, normal(batch, matrix.rows)
    return x, normal(matrix.columns), None


def _product(
    name: str, x: Tensor, matrix: Matrix, norm: Tensor | None, eps: float, residual: Tensor | None
) -> Tensor:
    """One of the four products, by the kernel that is chosen for it."""
    return _run(ops_choices.choice_of(name, matrix, len(x)), name, x, matrix, norm, eps, residual)


def _run(
    choice: Choice,
    name: str,
    x: Tensor,
    matrix: Matrix,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    """One of the four products, as told."""
    if isinstance(choice, Library):
        assert isinstance(matrix, Dense), f"{name}: cuBLAS multiplies no integers"
        return _library(name, x, matrix.weight, norm, eps, residual)
    rows = matrix.rows // 2 if name == "norm_gate_up" else matrix.rows
    out = residual
    if out is None:
        dtype = torch.float32 if name == "head" else x.dtype
        out = torch.empty((len(x), rows), dtype=dtype, device=x.device)
    kind: dict[str, Any] = {"NORM": norm is not None, "END": _ENDS[name], **_launch(choice.pdl)}
    if isinstance(choice, Rows):
        _rows(choice, x, x if norm is None else norm, matrix, out, rows, eps, kind)
    else:
        _tiles(choice, x, x if norm is None else norm, matrix, out, rows, eps, kind)
    return out


def _rows(
    choice: Rows,
    x: Tensor,
    norm: Tensor,
    matrix: Matrix,
    out: Tensor,
    N: int,
    eps: float,
    kind: dict[str, Any],
) -> None:
    """Launch kernels_rows.py; the results of `linear_add` go where the residual was."""
    B, C = x.shape
    kind |= {"C": C, "R": choice.rows, "num_warps": choice.warps}
    grid = (B * triton.cdiv(N, choice.rows),)
    if isinstance(matrix, Dense):
        kind["BLOCK"] = min(_CHUNK, _power(C))
        kernels_rows.dense_rows[grid](x, norm, matrix.weight, out, out, B, N, eps, **kind)
    else:
        kind["BLOCK"] = max(matrix.block, min(_CHUNK, _power(C)))
        stored, form = _packed(matrix)
        kernels_rows.packed_rows[grid](x, norm, *stored, out, out, B, N, eps, **form, **kind)


def _tiles(
    choice: Tiles,
    x: Tensor,
    norm: Tensor,
    matrix: Matrix,
    out: Tensor,
    N: int,
    eps: float,
    kind: dict[str, Any],
) -> None:
    """Launch kernels_tiles.py."""
    B, C = x.shape
    inputs, columns = ops_choices.padded(B), max(_LEAST, min(choice.columns, _power(C)))
    kind |= {"C": C, "BM": inputs, "BN": choice.rows, "BK": columns}
    kind |= {"num_warps": choice.warps, "num_stages": choice.stages}
    grid = (triton.cdiv(N, choice.rows), triton.cdiv(B, inputs))
    if isinstance(matrix, Dense):
        kernels_tiles.dense_tiles[grid](x, norm, matrix.weight, out, out, B, N, eps, **kind)
    else:
        stored, form = _packed(matrix)
        kernels_tiles.packed_tiles[grid](x, norm, *stored, out, out, B, N, eps, **form, **kind)


def _library(
    name: str, x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None
) -> Tensor:
    """cuBLAS for the product, kernels for what is before and after it."""
    B, C = x.shape
    launch = _launch(ops_choices.uses_pdl())
    h = x
    if norm is not None:
        h = torch.empty_like(x)
        kernels.rms_norm[(B,)](x, norm, h, eps, C=C, BLOCK=_power(C), **launch)
    if residual is not None:
        return residual.addmm_(h, weight.t())
    if name == "head" and h.dtype != torch.float32:
        return torch.mm(h, weight.t(), out_dtype=torch.float32)
    found = F.linear(h, weight)
    if name != "norm_gate_up":
        return found
    rows = len(weight) // 2
    out = torch.empty((B, rows), dtype=x.dtype, device=x.device)
    kernels.gate[(B, triton.cdiv(rows, _PIECE))](found, out, F=rows, BLOCK=_PIECE, **launch)
    return out


def _packed(matrix: Packed) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The tensors of a packed matrix as kernels take them, in words; and what they are compiled for."""
    offsets = matrix.scales if matrix.offsets is None else matrix.offsets
    factors = matrix.scales if matrix.factors is None else matrix.factors
    form = {"Q": matrix.block, "BITS": matrix.bits}
    form |= {"OFFSETS": matrix.offsets is not None, "FACTORS": matrix.factors is not None}
    words = matrix.integers.view(torch.int32)
    return (words, matrix.scales, offsets, factors, _EXPONENTS[matrix.bits]), form


def _launch(pdl: bool) -> dict[str, Any]:
    """What a kernel, and its launch, are told about programmatic dependent launch."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def _power(count: int) -> int:
    power: int = triton.next_power_of_2(count)
    return power
