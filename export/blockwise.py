"""Our own block quantizer: float32 rows to and from the integers that ONNX Runtime's operators read.

Owns the arithmetic and the packing of the ONNX rows of the quantization table (`q{bits}{s|a}{block}`), as
MatMulNBits and GatherBlockQuantized define them: value = (integer - zero point) * scale, unsigned integers,
lowest bits first. Knows nothing of files, tensors' names or graphs.

Shapes: R rows, C columns, K weights per block, B = C / K blocks per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fox_edge.quant import QuantType

# A narrow type gains more from finer steps than it loses by clipping a block's few largest weights, so
# several shrunken ranges are tried and each block keeps the one with the least squared error. At 8 bits the
# steps are fine enough: the whole range is kept.
SHRINKS: dict[int, tuple[float, ...]] = {
    8: (1.0,),
    4: (1.0, 0.95, 0.9, 0.85, 0.8),
    2: (1.0, 0.85, 0.7, 0.55, 0.4),
}
# Blocks whose step would be smaller hold nothing but zeros and dust; 1 / step must stay finite.
SMALLEST_STEP = 1e-30


class Blocks(NamedTuple):
    """Quantized rows."""

    packed: Tensor  # uint8 (R, B, K * bits / 8)
    scales: Tensor  # float32 (R, B)
    zero_points: Tensor | None  # uint8 (R, ceil(B * bits / 8)), packed like the integers; None: 2^(bits - 1)


def quantize(rows: Tensor, type_: QuantType) -> Blocks:
    """Round float32 rows (R, C) to the nearest integers of a type; C must be a whole number of blocks.

    Symmetric: the weight of largest magnitude becomes integer 0, the middle 2^(bits - 1) is zero.
    Asymmetric: the block's smallest and largest weight (and always zero) span the integers.
    """
    type_.row_bytes("rows", rows.shape[1])
    x = rows.reshape(rows.shape[0], -1, type_.block_size)
    ends = _symmetric_ends(x, type_.bits) if type_.symmetric else _asymmetric_ends(x)
    best: tuple[Tensor, ...] | None = None
    for shrink in SHRINKS[type_.bits]:
        tried = _round(x, ends[0] * shrink, ends[1] * shrink, type_.bits)
        best = tried if best is None else _better(best, tried)
    assert best is not None
    integers, scales, zeros, _ = best
    points = None if type_.symmetric else pack(zeros.to(torch.uint8), type_.bits)
    return Blocks(pack(integers.to(torch.uint8), type_.bits), scales, points)


def dequantize(blocks: Blocks, type_: QuantType) -> Tensor:
    """Float32 rows (R, C) of what `quantize` gave."""
    scales = blocks.scales
    integers = unpack(blocks.packed, type_.bits).float()
    if blocks.zero_points is None:
        zeros = torch.full_like(scales, 2 ** (type_.bits - 1))
    else:
        zeros = unpack(blocks.zero_points, type_.bits)[:, : scales.shape[1]].float()
    return ((integers - zeros[..., None]) * scales[..., None]).flatten(1)


def _symmetric_ends(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The values (R, B) of integer 0 and of the last integer, such that the middle integer is zero.

    Signed: a block whose largest weight is positive gets a negative scale, since only integer 0 lies a full
    2^(bits - 1) steps from the middle.
    """
    low, high = torch.aminmax(x, dim=-1)
    extreme = torch.where(high > -low, high, low)
    middle = 2 ** (bits - 1)
    return extreme, extreme * (-(middle - 1) / middle)


def _asymmetric_ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The values (R, B) of integer 0 and of the last integer; zero lies between them."""
    low, high = torch.aminmax(x, dim=-1)
    return low.clamp(max=0), high.clamp(min=0)


def _round(x: Tensor, first: Tensor, last: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers (R, B, K), scales, zero points and squared errors (R, B), all float32, for given ends."""
    levels = 2**bits - 1
    scales = last / levels - first / levels  # the difference itself could overflow
    scales = torch.where(scales.abs() < SMALLEST_STEP, 0.0, scales)
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    zeros = (-first * inverse).round_()
    exact = (x * inverse[..., None]).add_(zeros[..., None])
    integers = exact.round().clamp_(0, levels)
    errors = exact.sub_(integers).square_().sum(-1) * scales.square()
    return integers, scales, zeros, errors


def _better(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Block by block the attempt with the smaller squared error."""
    wins = b[3] < a[3]
    return torch.where(wins[..., None], b[0], a[0]), *(
        torch.where(wins, y, x) for x, y in zip(a[1:], b[1:], strict=True)
    )


def pack(integers: Tensor, bits: int) -> Tensor:
    """uint8 integers (..., n) below 2^bits -> bytes (..., ceil(n * bits / 8)), first in the lowest bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return integers
    if missing := -integers.shape[-1] % per_byte:
        integers = torch.nn.functional.pad(integers, (0, missing))
    packed = integers[..., 0::per_byte].clone()
    for i in range(1, per_byte):
        packed |= integers[..., i::per_byte] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes (..., n) -> uint8 integers (..., n * 8 / bits): the inverse of `pack`, padding included."""
    fields = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(fields, dim=-1).flatten(-2)
