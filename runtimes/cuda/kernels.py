"""Pieces that the kernels share, and the small kernels: embedding, norm, gate, dequantization.

Triton, for Hopper (compute capability 9.0) and anything newer; under TRITON_INTERPRET=1 the same code runs on
the CPU. Kernels know pointers and sizes; how many programs, warps and rows there are is ops_triton.py's.

Shapes of packed matrices: a 32-bit word holds P = 32 / BITS integers of a row, the first in its lowest bits;
Q columns share a scale. C columns in all, in chunks of BLOCK, a power of two that whole blocks fill.

With PDL (programmatic dependent launch) a kernel may start while the one before it still runs. Until
`gdc_wait` it reads nothing but weights, which no kernel of a step writes; and as every kernel waits, the end
of one is the end of all before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

PLAIN: tl.constexpr = tl.constexpr(0)
ADD: tl.constexpr = tl.constexpr(1)
GATE: tl.constexpr = tl.constexpr(2)


@triton.jit
def started(PDL: tl.constexpr):
    """The next kernel may start to load its weights."""
    if PDL:
        cuda.gdc_launch_dependents()


@triton.jit
def predecessors_done(PDL: tl.constexpr):
    """What earlier kernels wrote can be read from here on, and what they read be written.

    Without PDL a barrier, which costs next to nothing: it keeps the compiler from moving the loads of weights
    behind the use of what comes after; they come first because they take longest.
    """
    if PDL:
        cuda.gdc_wait()
    else:
        tl.debug_barrier()


@triton.jit
def columns_of(pointer, start, C: tl.constexpr, BLOCK: tl.constexpr):
    """Elements [start, start + BLOCK) of a vector of C, float32; zeros behind its end."""
    columns = start + tl.arange(0, BLOCK)
    if C % BLOCK == 0:
        values = tl.load(pointer + columns)
    else:
        values = tl.load(pointer + columns, mask=columns < C, other=0.0)
    return values.to(tl.float32)


@triton.jit
def tile_of(pointer, rows, start, C: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [start, start + BLOCK) of some rows of a matrix (N, C), as stored; zeros behind its end.

    They are read once in a step, so they leave the cache to what is read again, the input.
    """
    columns = start + tl.arange(0, BLOCK)
    at = pointer + rows.to(tl.int64)[:, None] * C + columns[None, :]
    if C % BLOCK == 0:
        values = tl.load(at, eviction_policy="evict_first")
    else:
        values = tl.load(at, mask=(columns < C)[None, :], other=0, eviction_policy="evict_first")
    return values


@triton.jit
def nibble(words, exponent, PLACE: tl.constexpr):
    """128 + the integer of 4 bits at a place (0 to 7) of each word, float32.

    Its bits are put under the exponent of 128, where the last of them counts 1: a shift and a logical
    operation, no conversion. `exponent`, 128.0 as bits, is an argument of the kernel: only with one of its
    two constants in a register is the logical operation one instruction.
    """
    SHIFT: tl.constexpr = 16 - 4 * PLACE
    if SHIFT > 0:
        words = words << SHIFT
    elif SHIFT < 0:
        words = words >> -SHIFT
    return ((words & 0x000F0000) | exponent).to(tl.float32, bitcast=True)


@triton.jit
def byte(words, exponent, PLACE: tl.constexpr):
    """256 + the integer of 8 bits at a place (0 to 3) of each word, float32; as `nibble`, with 256.0."""
    SHIFT: tl.constexpr = 15 - 8 * PLACE
    if SHIFT > 0:
        words = words << SHIFT
    elif SHIFT < 0:
        words = words >> -SHIFT
    return ((words & 0x007F8000) | exponent).to(tl.float32, bitcast=True)


@triton.jit
def integers(words, exponent, BITS: tl.constexpr):
    """The integers of words (R, W) in the order of their columns, float32 (R, W * P).

    `join` adds a last axis, so the highest bit of a place is joined first.
    """
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if BITS == 4:
        even0 = tl.join(nibble(words, exponent, 0), nibble(words, exponent, 4))
        even2 = tl.join(nibble(words, exponent, 2), nibble(words, exponent, 6))
        odd1 = tl.join(nibble(words, exponent, 1), nibble(words, exponent, 5))
        odd3 = tl.join(nibble(words, exponent, 3), nibble(words, exponent, 7))
        found = tl.join(tl.join(even0, even2), tl.join(odd1, odd3))
        found = tl.reshape(found, (R, W * 8)) - 128.0
    else:
        even = tl.join(byte(words, exponent, 0), byte(words, exponent, 2))
        odd = tl.join(byte(words, exponent, 1), byte(words, exponent, 3))
        found = tl.reshape(tl.join(even, odd), (R, W * 4)) - 256.0
    return found


@triton.jit
def spread(numbers, Q: tl.constexpr):
    """One number of each block (R, n) for each of its Q columns: (R, n * Q)."""
    R: tl.constexpr = numbers.shape[0]
    COUNT: tl.constexpr = numbers.shape[1]
    return tl.reshape(tl.broadcast_to(numbers[:, :, None], (R, COUNT, Q)), (R, COUNT * Q))


@triton.jit
def values_of(
    words, scales, offsets, factors, exponent, rows, start,
    C: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSETS: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """What columns [start, start + BLOCK) of some rows of a packed matrix stand for, float32 (R, BLOCK)."""
    P: tl.constexpr = 32 // BITS
    stored = tile_of(words, rows, start // P, C // P, BLOCK // P)
    # A chunk may be a part of one block.
    COUNT: tl.constexpr = (BLOCK + Q - 1) // Q
    s = tile_of(scales, rows, start // Q, C // Q, COUNT).to(tl.float32)
    o = s * -(1 << (BITS - 1))
    if OFFSETS:
        o = tile_of(offsets, rows, start // Q, C // Q, COUNT).to(tl.float32)
    found = integers(stored, exponent, BITS) * spread(s, BLOCK // COUNT) + spread(o, BLOCK // COUNT)
    if FACTORS:
        found *= columns_of(factors, start, C, BLOCK)[None, :]
    return found


@triton.jit
def silu(x):
    """x / (1 + exp(-x))."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def embed_dense(tokens, weight, out, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (b, chunk): one piece of one row. Moves B rows of 4 KB: nothing beside one launch."""
    started(PDL)
    predecessors_done(PDL)
    b, start = tl.program_id(0), tl.program_id(1) * BLOCK
    token = tl.load(tokens + b).to(tl.int64)
    columns = start + tl.arange(0, BLOCK)
    row = columns_of(weight + token * C, start, C, BLOCK)
    tl.store(out + b * C + columns, row.to(out.dtype.element_ty), mask=columns < C)


@triton.jit
def embed_packed(
    tokens, words, scales, offsets, factors, exponent, out,
    C: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSETS: tl.constexpr, FACTORS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (b, chunk): one piece of one row, from its integers."""
    started(PDL)
    predecessors_done(PDL)
    b, start = tl.program_id(0), tl.program_id(1) * BLOCK
    token = tl.load(tokens + b + tl.arange(0, 1))
    columns = start + tl.arange(0, BLOCK)[None, :]
    row = values_of(
        words, scales, offsets, factors, exponent, token, start, C, Q, BITS, BLOCK, OFFSETS, FACTORS
    )
    tl.store(out + b * C + columns, row.to(out.dtype.element_ty), mask=columns < C)


@triton.jit
def dequantize_packed(
    words, scales, offsets, factors, exponent, out, N,
    C: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    OFFSETS: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """Program (tile, chunk): R rows, one chunk of columns.

    Moves BITS / 8 and 2 bytes a weight: a matrix of 8192 x 2048 at 4 bits 42 MB, 10 us at 4.3 TB/s.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    inside = tl.minimum(rows, N - 1)
    found = values_of(
        words, scales, offsets, factors, exponent, inside, start, C, Q, BITS, BLOCK, OFFSETS, FACTORS
    )
    mask = (rows < N)[:, None] & (columns < C)[None, :]
    tl.store(
        out + rows.to(tl.int64)[:, None] * C + columns[None, :], found.to(out.dtype.element_ty), mask=mask
    )


@triton.jit
def rms_norm(x, norm, out, eps, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program b: one row, in one piece. Moves 3 rows of 4 KB a conversation: nothing beside one launch."""
    started(PDL)
    weight = columns_of(norm, 0, C, BLOCK)
    predecessors_done(PDL)
    b, columns = tl.program_id(0), tl.arange(0, BLOCK)
    h = columns_of(x + b * C, 0, C, BLOCK)
    h *= tl.rsqrt(tl.sum(h * h, axis=0) / C + eps) * weight
    tl.store(out + b * C + columns, h.to(out.dtype.element_ty), mask=columns < C)


@triton.jit
def gate(gate_up, out, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (b, chunk): silu(gate) * up. Moves 3 rows of 8 KB a conversation: nothing beside one launch."""
    started(PDL)
    predecessors_done(PDL)
    b, start = tl.program_id(0), tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    g = columns_of(gate_up + b * 2 * F, start, F, BLOCK)
    u = columns_of(gate_up + b * 2 * F + F, start, F, BLOCK)
    tl.store(out + b * F + columns, (silu(g) * u).to(out.dtype.element_ty), mask=columns < F)
