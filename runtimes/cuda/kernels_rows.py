"""Products for one or two conversations: each program multiplies a few rows by one input.

The time is that of reading the matrix, so all of a chunk's weights are asked for before anything is computed:
8 rows of 2048 columns are 32 KB in BF16, 8 KB at 4 bits, in flight in every program. The warps of a program
share the columns, and each lane sums in one order whatever the number of rows: a row's bits depend on the row
and the input alone, not on rows beside it nor on who else asks. The second of two conversations reads the
matrix from the cache: its program follows at once.

RMSNorm needs the input's mean square, which every program finds for itself while it multiplies: the input is
4 KB, in the cache. Its root is the same for all columns, so it is applied to the finished sum.

Bytes that Fox-1's products must move in BF16, and their floor at 4.3 TB/s (a step: 3.33 GB, 0.77 ms):
norm + qkv 12.6 MB, 2.9 us; o_proj + residual 8.4 MB, 2.0 us; norm + gate, up 33.6 MB, 7.8 us; down + residual
16.8 MB, 3.9 us; norm + head 1,049 MB, 244 us. At 8 bits half of it, at 4 bits a quarter, and scales: 2 bytes
for 32 weights are 1/8 of 4 bits, offsets as much again. Floors so short leave launches of about 1 us a large
share: hence 5 of them a layer, and PDL.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtimes.cuda.kernels import (
    ADD,
    GATE,
    byte,
    columns_of,
    nibble,
    predecessors_done,
    silu,
    started,
    tile_of,
)


@triton.jit
def finish(
    out, residual, b, rows, N, total, up, square, eps, C: tl.constexpr, NORM: tl.constexpr, END: tl.constexpr
):
    """Apply the norm's root and what follows the product to the sums (R,) of some rows, and write them."""
    if NORM:
        root = tl.rsqrt(square / C + eps)
        total *= root
        up *= root
    if END == GATE:
        total = silu(total) * up
    at = b * N + rows
    if END == ADD:
        total += tl.load(residual + at, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=rows < N)


@triton.jit
def input_of(x, norm, start, C: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr):
    """A chunk of the input, float32 (BLOCK,), times the norm's weights; and its sum of squares."""
    h = columns_of(x, start, C, BLOCK)
    square = tl.sum(h * h, axis=0)
    if NORM:
        h *= columns_of(norm, start, C, BLOCK)
    return h, square


@triton.jit
def dense_rows(
    x, norm, weight, residual, out, B, N, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    NORM: tl.constexpr, END: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, b): R rows of (N, C), or of (2N, C) for a gate and what it gates, times row b of x."""
    started(PDL)
    b = tl.program_id(0) % B
    rows = tl.program_id(0) // B * R + tl.arange(0, R)
    inside = tl.minimum(rows, N - 1)
    first = tile_of(weight, inside, 0, C, BLOCK)
    second = first
    if END == GATE:
        second = tile_of(weight, inside + N, 0, C, BLOCK)
    predecessors_done(PDL)
    h, square = input_of(x + b * C, norm, 0, C, BLOCK, NORM)
    total = tl.sum(first.to(tl.float32) * h[None, :], axis=1)
    up = total
    if END == GATE:
        up = tl.sum(second.to(tl.float32) * h[None, :], axis=1)
    for start in range(BLOCK, C, BLOCK):
        first = tile_of(weight, inside, start, C, BLOCK)
        if END == GATE:
            second = tile_of(weight, inside + N, start, C, BLOCK)
        h, more = input_of(x + b * C, norm, start, C, BLOCK, NORM)
        square += more
        total += tl.sum(first.to(tl.float32) * h[None, :], axis=1)
        if END == GATE:
            up += tl.sum(second.to(tl.float32) * h[None, :], axis=1)
    finish(out, residual, b, rows, N, total, up, square, eps, C, NORM, END)


@triton.jit
def by_place(h, P: tl.constexpr):
    """The inputs (BLOCK,) for each place of a word: P tensors (BLOCK / P,); `split` goes by the last bit."""
    W: tl.constexpr = h.shape[0] // P
    even, odd = tl.split(tl.reshape(h, (W * P // 2, 2)))
    if P == 4:
        h0, h2 = tl.split(tl.reshape(even, (W, 2)))
        h1, h3 = tl.split(tl.reshape(odd, (W, 2)))
        h4, h5, h6, h7 = h0, h1, h2, h3  # never read
    else:
        even0, even2 = tl.split(tl.reshape(even, (W * 2, 2)))
        odd1, odd3 = tl.split(tl.reshape(odd, (W * 2, 2)))
        h0, h4 = tl.split(tl.reshape(even0, (W, 2)))
        h2, h6 = tl.split(tl.reshape(even2, (W, 2)))
        h1, h5 = tl.split(tl.reshape(odd1, (W, 2)))
        h3, h7 = tl.split(tl.reshape(odd3, (W, 2)))
    return h0, h1, h2, h3, h4, h5, h6, h7


@triton.jit
def packed_sum(words, s, o, h, exponent, Q: tl.constexpr, BITS: tl.constexpr):
    """Sums (R,) of a chunk: words (R, W), scales and offsets (R, n), inputs (BLOCK,).

    With the bias b that `nibble` and `byte` add, a block gives s * sum((b + q) h) + (o - b s) * sum(h): one
    multiplication a weight, and two a block.
    """
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    COUNT: tl.constexpr = s.shape[1]
    BIAS: tl.constexpr = 128.0 if BITS == 4 else 256.0
    h0, h1, h2, h3, h4, h5, h6, h7 = by_place(h, 32 // BITS)
    if BITS == 4:
        sums = nibble(words, exponent, 0) * h0[None, :]
        sums += nibble(words, exponent, 1) * h1[None, :]
        sums += nibble(words, exponent, 2) * h2[None, :]
        sums += nibble(words, exponent, 3) * h3[None, :]
        sums += nibble(words, exponent, 4) * h4[None, :]
        sums += nibble(words, exponent, 5) * h5[None, :]
        sums += nibble(words, exponent, 6) * h6[None, :]
        sums += nibble(words, exponent, 7) * h7[None, :]
    else:
        sums = byte(words, exponent, 0) * h0[None, :]
        sums += byte(words, exponent, 1) * h1[None, :]
        sums += byte(words, exponent, 2) * h2[None, :]
        sums += byte(words, exponent, 3) * h3[None, :]
    blocks = tl.sum(tl.reshape(sums, (R, COUNT, W // COUNT)), axis=2)
    inputs = tl.sum(tl.reshape(h, (COUNT, Q)), axis=1)
    return tl.sum(s * blocks + (o - BIAS * s) * inputs[None, :], axis=1)


@triton.jit
def chunk_of(
    words, scales, offsets, rows, start,
    C: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Words (R, W), scales and offsets (R, n) of a chunk of some rows."""
    P: tl.constexpr = 32 // BITS
    stored = tile_of(words, rows, start // P, C // P, BLOCK // P)
    s = tile_of(scales, rows, start // Q, C // Q, BLOCK // Q).to(tl.float32)
    o = s * -(1 << (BITS - 1))
    if OFFSETS:
        o = tile_of(offsets, rows, start // Q, C // Q, BLOCK // Q).to(tl.float32)
    return stored, s, o


@triton.jit
def packed_rows(
    x, norm, words, scales, offsets, factors, exponent, residual, out, B, N, eps,
    C: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    OFFSETS: tl.constexpr, FACTORS: tl.constexpr, NORM: tl.constexpr, END: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `dense_rows`, from integers in blocks."""
    started(PDL)
    b = tl.program_id(0) % B
    rows = tl.program_id(0) // B * R + tl.arange(0, R)
    inside = tl.minimum(rows, N - 1)
    first, s, o = chunk_of(words, scales, offsets, inside, 0, C, Q, BITS, BLOCK, OFFSETS)
    second, s2, o2 = first, s, o
    if END == GATE:
        second, s2, o2 = chunk_of(words, scales, offsets, inside + N, 0, C, Q, BITS, BLOCK, OFFSETS)
    predecessors_done(PDL)
    h, square = input_of(x + b * C, norm, 0, C, BLOCK, NORM)
    if FACTORS:
        h *= columns_of(factors, 0, C, BLOCK)
    total = packed_sum(first, s, o, h, exponent, Q, BITS)
    up = total
    if END == GATE:
        up = packed_sum(second, s2, o2, h, exponent, Q, BITS)
    for start in range(BLOCK, C, BLOCK):
        first, s, o = chunk_of(words, scales, offsets, inside, start, C, Q, BITS, BLOCK, OFFSETS)
        if END == GATE:
            second, s2, o2 = chunk_of(words, scales, offsets, inside + N, start, C, Q, BITS, BLOCK, OFFSETS)
        h, more = input_of(x + b * C, norm, start, C, BLOCK, NORM)
        if FACTORS:
            h *= columns_of(factors, start, C, BLOCK)
        square += more
        total += packed_sum(first, s, o, h, exponent, Q, BITS)
        if END == GATE:
            up += packed_sum(second, s2, o2, h, exponent, Q, BITS)
    finish(out, residual, b, rows, N, total, up, square, eps, C, NORM, END)
