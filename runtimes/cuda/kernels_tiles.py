"""Products for several conversations: tiles of the matrix times all inputs at once, on the tensor cores.

A program takes BN rows of the matrix and up to BM conversations (16, 32 or 64; missing ones count as zeros).
The matrix is the left operand, which the tensor cores can take from registers, where integers become BF16,
and is read once for all. Sums are float32, in the order of the columns. RMSNorm as in kernels_rows.py: its
weights on the way in, the root at the end.

Bytes at Fox-1's shape and their floor are those of kernels_rows.py: up to 64 conversations the inputs, 4 KB
each, and 2 operations a weight and conversation (0.2 T a step of 64; the tensor cores do 700 T/s) stay small
beside the matrix. What can lie above the floor is the unpacking: about 4 operations a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtimes.cuda.kernels import (
    ADD,
    GATE,
    columns_of,
    predecessors_done,
    silu,
    started,
    tile_of,
    values_of,
)


@triton.jit
def inputs_of(x, norm, conversations, B, start, C: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr):
    """Columns [start, start + BK) of rows of x, (BM, BK), times the norm's weights; sums of squares (BM,)."""
    columns = start + tl.arange(0, BK)
    at = x + conversations[:, None] * C + columns[None, :]
    mask = (conversations < B)[:, None]
    if C % BK != 0:
        mask = mask & (columns < C)[None, :]
    h = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    square = tl.sum(h * h, axis=1)
    if NORM:
        h *= columns_of(norm, start, C, BK)[None, :]
    return h.to(x.dtype.element_ty), square


@triton.jit
def finish_tile(
    out, residual, rows, conversations, N, B, total, up, square, eps,
    C: tl.constexpr, NORM: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """Apply the norm's root and what follows the product to the sums (BN, BM), and write them."""
    if NORM:
        root = tl.rsqrt(square / C + eps)[None, :]
        total *= root
        up *= root
    if END == GATE:
        total = silu(total) * up
    at = conversations[None, :].to(tl.int64) * N + rows[:, None]
    mask = (rows < N)[:, None] & (conversations < B)[None, :]
    if END == ADD:
        total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dense_tiles(
    x, norm, weight, residual, out, B, N, eps,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, END: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, conversations): BN rows of (N, C), or of (2N, C) for a gate and what it gates."""
    started(PDL)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    conversations = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = tl.minimum(rows, N - 1)
    predecessors_done(PDL)
    total = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    square = tl.zeros((BM,), tl.float32)
    for start in range(0, C, BK):
        h, more = inputs_of(x, norm, conversations, B, start, C, BK, NORM)
        square += more
        w = tile_of(weight, inside, start, C, BK)
        total = tl.dot(w, tl.trans(h), total, input_precision="ieee")
        if END == GATE:
            w = tile_of(weight, inside + N, start, C, BK)
            up = tl.dot(w, tl.trans(h), up, input_precision="ieee")
    finish_tile(out, residual, rows, conversations, N, B, total, up, square, eps, C, NORM, END)


@triton.jit
def packed_tiles(
    x, norm, words, scales, offsets, factors, exponent, residual, out, B, N, eps,
    C: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    OFFSETS: tl.constexpr, FACTORS: tl.constexpr, NORM: tl.constexpr, END: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `dense_tiles`, from integers in blocks, which are rounded to the input's type."""
    started(PDL)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    conversations = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = tl.minimum(rows, N - 1)
    predecessors_done(PDL)
    total = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    square = tl.zeros((BM,), tl.float32)
    for start in range(0, C, BK):
        h, more = inputs_of(x, norm, conversations, B, start, C, BK, NORM)
        square += more
        w = values_of(
            words, scales, offsets, factors, exponent, inside, start, C, Q, BITS, BK, OFFSETS, FACTORS
        )
        total = tl.dot(w.to(h.dtype), tl.trans(h), total, input_precision="ieee")
        if END == GATE:
            w = values_of(
                words, scales, offsets, factors, exponent, inside + N, start, C, Q, BITS, BK, OFFSETS, FACTORS
            )
            up = tl.dot(w.to(h.dtype), tl.trans(h), up, input_precision="ieee")
    finish_tile(out, residual, rows, conversations, N, B, total, up, square, eps, C, NORM, END)
