"""Attention of one new position of each conversation over its own past, split over positions.

Program (b, k, s) holds the queries that share KV head k and goes through positions [s, s + 1) * LENGTH of the
conversation's slot, with the running maximum of an online softmax (Milakov and Gimelshein, 2018); programs
behind the conversation's position leave at once. LENGTH does not depend on how long a text is. The split that
holds the new position takes k and v from the projections and writes them into the cache; nobody reads that
place in the same step.

Several splits are weighed together (as in FlashDecoding; Dao et al., 2023) by the program that comes last,
which an atomic counter tells: a kernel for it alone would be one launch more in each layer. It goes through
the splits in their order, so that it does not matter who was last, and sets the counter back.

Bytes that must move: keys and values of the past, at Fox-1's shape in BF16 2 KB a position and layer. At 746
positions (the paper's workload, last token) 1.5 MB, 0.4 us at 4.3 TB/s, less than a launch; 64 conversations
of 8192 positions 1.1 GB, 250 us. Partial sums are D + 2 float32 a head and split: 1/16 of that at LENGTH 256
and 4 queries to a KV head, and they stay in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtimes.cuda.kernels import predecessors_done, started

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def rotated(head, cos, sin, dims, D: tl.constexpr):
    """Heads at `head` (n, 1) turned by one position's tables, float32 (n, DP); i pairs with i + D/2."""
    HALF: tl.constexpr = D // 2
    low = dims < HALF
    inside = dims < D
    frequency = tl.where(low, dims, dims - HALF)
    c = tl.load(cos + frequency, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + frequency, mask=inside, other=0.0)[None, :]
    s = tl.where(low[None, :], -s, s)
    partner = tl.where(low, dims + HALF, dims - HALF)
    here = tl.load(head + dims[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    there = tl.load(head + partner[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    return here * c + there * s


@triton.jit
def combine(
    partial, weights, out, first, count, used,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr,
    TOGETHER: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The splits of `used` heads from `first` on, TOGETHER at a time, weighed by their softmax's sums.

    Past the first-level cache, which may hold what was there before other programs wrote.
    """
    heads, dims = tl.arange(0, HEADS), tl.arange(0, DP)
    row = first + tl.minimum(heads, used - 1)
    most = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, DP), tl.float32)
    for start in range(0, count, TOGETHER):
        splits = start + tl.arange(0, TOGETHER)
        there = (splits < count)[:, None]
        place = row.to(tl.int64)[None, :] * SPLITS + splits[:, None]  # (TOGETHER, HEADS)
        peak = tl.load(weights + 2 * place, mask=there, other=float("-inf"), cache_modifier=".cg")
        weight = tl.load(weights + 2 * place + 1, mask=there, other=0.0, cache_modifier=".cg")
        at = (place * D)[:, :, None] + dims[None, None, :]
        mask = there[:, :, None] & (dims < D)[None, None, :]
        part = tl.load(partial + at, mask=mask, other=0.0, cache_modifier=".cg")
        new = tl.maximum(most, tl.max(peak, axis=0))
        fade = tl.exp2(most - new)
        share = tl.exp2(peak - new[None, :])
        total = total * fade + tl.sum(weight * share, axis=0)
        sums = sums * fade[:, None] + tl.sum(part * share[:, :, None], axis=0)
        most = new
    found = sums / total[:, None]
    mask = (heads < used)[:, None] & (dims < D)[None, :]
    tl.store(out + (row * D)[:, None] + dims[None, :], found.to(out.dtype.element_ty), mask=mask)


@triton.jit
def attend(
    qkv, keys, values, slots, positions, cos, sin, out, partial, weights, counters, S, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
    LENGTH: tl.constexpr, TILE: tl.constexpr, TOGETHER: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """G >= H / K rows of queries and DP >= D columns, filled up with zeros to what `tl.dot` takes.

    partial (B, H, SPLITS, D): sums; weights (B, H, SPLITS, 2): maximum, and sum of the exponentials; counters
    (B, K): zeros, before and after. HEADS: H / K or the next power of two.
    """
    started(PDL)
    predecessors_done(PDL)
    b, k, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + b)
    slot = tl.load(slots + b)
    begin = split * LENGTH
    if begin > position:
        return
    SHARED: tl.constexpr = H // K
    dims, group = tl.arange(0, DP), tl.arange(0, G)
    inside, used = dims < D, group < SHARED
    heads = k * SHARED + tl.minimum(group, SHARED - 1)
    row = qkv + b * (H + 2 * K) * D
    at = position.to(tl.int64) * (D // 2)
    q = rotated(row + (heads * D)[:, None], cos + at, sin + at, dims, D).to(qkv.dtype.element_ty)
    base = (slot.to(tl.int64) * K + k) * S * D

    most = tl.full((G,), float("-inf"), tl.float32)
    total = tl.zeros((G,), tl.float32)
    sums = tl.zeros((G, DP), tl.float32)
    for start in range(begin, tl.minimum(begin + LENGTH, position), TILE):
        places = start + tl.arange(0, TILE)
        seen = places < position
        tile = base + places[:, None] * D + dims[None, :]
        mask = seen[:, None] & inside[None, :]
        key = tl.load(keys + tile, mask=mask, other=0.0)
        value = tl.load(values + tile, mask=mask, other=0.0)
        scores = tl.dot(q.to(key.dtype), tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, axis=1))
        shares = tl.exp2(scores - new[:, None])
        fade = tl.exp2(most - new)
        total = total * fade + tl.sum(shares, axis=1)
        sums = tl.dot(shares.to(value.dtype), value, sums * fade[:, None], input_precision="ieee")
        most = new

    if position < begin + LENGTH:
        one = tl.arange(0, 1)[:, None] + (H + k) * D
        key = rotated(row + one, cos + at, sin + at, dims, D).to(qkv.dtype.element_ty)
        value = tl.load(row + one + K * D + dims[None, :], mask=inside[None, :], other=0.0)
        tile = base + position * D + dims[None, :]
        tl.store(keys + tile, key.to(keys.dtype.element_ty), mask=inside[None, :])
        tl.store(values + tile, value.to(values.dtype.element_ty), mask=inside[None, :])
        score = tl.sum(q.to(tl.float32) * key.to(tl.float32), axis=1) * scale
        new = tl.maximum(most, score)
        share = tl.exp2(score - new)
        fade = tl.exp2(most - new)
        total = total * fade + share
        sums = sums * fade[:, None] + share[:, None] * value.to(tl.float32)
        most = new

    head = b * H + heads
    mask = used[:, None] & inside[None, :]
    if position < LENGTH:
        found = sums / total[:, None]
        tl.store(out + (head * D)[:, None] + dims[None, :], found.to(out.dtype.element_ty), mask=mask)
    else:
        place = head.to(tl.int64) * SPLITS + split
        tl.store(partial + (place * D)[:, None] + dims[None, :], sums, mask=mask)
        tl.store(weights + 2 * place, most, mask=used)
        tl.store(weights + 2 * place + 1, total, mask=used)
        # This program has written everything before one of its threads counts it, a release: who finds the
        # count full, an acquire, sees the writes of all.
        tl.debug_barrier()
        count = position // LENGTH + 1
        counter = counters + b * K + k
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1:
            tl.store(counter, 0)
            first = b * H + k * SHARED
            combine(partial, weights, out, first, count, SHARED, H, D, DP, HEADS, TOGETHER, SPLITS)
