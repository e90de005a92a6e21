"""Our own block quantizer: float32 rows to and from the integers that ONNX Runtime and XNNPACK read.

Owns the arithmetic and the packing of the ONNX and PTE rows of the quantization table, as MatMulNBits,
GatherBlockQuantized and XNNPACK define them: value = (integer - zero point) * scale, unsigned integers,
lowest bits first. Works on any device. How integers are chosen with an eye on the input is the exporter's
(export/compensate.py); files and graphs are others'.

Shapes: R rows, C columns, K weights per block, B = C / K blocks per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fox_edge.quant import QuantType

if TYPE_CHECKING:
    from fox_edge.checkpoint import Checkpoint

# A narrow type gains more from finer steps than it loses by clipping a block's few largest weights, so
# several shrunken ranges are tried and each block keeps the one with the least weighted squared error.
SHRINKS: dict[int, tuple[float, ...]] = {
    8: (1.0,),
    4: (1.0, 0.93, 0.86, 0.79, 0.72),
    2: (1.0, 0.85, 0.7, 0.55, 0.4),
}
# Blocks whose step would be smaller hold nothing but zeros and dust; 1 / step must stay finite.
SMALLEST_STEP = 1e-30
# Pieces, evenly spread over a matrix, from which the size of its columns is learned, and weights of each.
_SCALE_SAMPLES, _SCALE_WEIGHTS = 256, 1 << 17


class Blocks(NamedTuple):
    """Quantized rows."""

    packed: Tensor  # uint8 (R, B, K * bits / 8)
    scales: Tensor  # float32 (R, B)
    zero_points: Tensor | None  # uint8 (R, ceil(B * bits / 8)), packed like the integers; None: 2^(bits - 1)


class Grid(NamedTuple):
    """The values that each block can take: (integer - zero) * scale, integers from 0 to 2^bits - 1."""

    scales: Tensor  # float32 (R, B)
    zeros: Tensor  # float32 (R, B), whole numbers

    def integers(self, x: Tensor, bits: int) -> Tensor:
        """The nearest integers, float32, to blocks of weights (R, B, K)."""
        inverse = inverse_of(self.scales)
        exact = (x * inverse[..., None]).add_(self.zeros[..., None])
        return exact.round_().clamp_(0, 2**bits - 1)


def inverse_of(scales: Tensor) -> Tensor:
    """1 / scale, and 0 for the scale 0 of a block of zeros."""
    return torch.where(scales == 0, 0.0, 1 / scales)


def quantize(rows: Tensor, type_: QuantType, importance: Tensor | None = None) -> Blocks:
    """Round float32 rows (R, C) to the nearest integers of a type; C must be a whole number of blocks.

    With `importance` (C,), what an error in each column costs, the grid of each block is searched for
    (`search`); without, it spans the block's range (`span`).
    """
    type_.row_bytes("rows", rows.shape[1])
    x = rows.reshape(rows.shape[0], -1, type_.block_size)
    grid = span(x, type_) if importance is None else search(x, type_, importance)
    return store(grid.integers(x, type_.bits), grid, type_)


def store(integers: Tensor, grid: Grid, type_: QuantType) -> Blocks:
    """Integers (R, B, K), whatever dtype they are whole numbers of, and their grid as they lie in a file."""
    points = None if type_.symmetric else pack(grid.zeros.to(torch.uint8), type_.bits)
    return Blocks(pack(integers.to(torch.uint8), type_.bits), grid.scales, points)


def dequantize(blocks: Blocks, type_: QuantType) -> Tensor:
    """Float32 rows (R, C) of what `quantize` gave."""
    scales = blocks.scales
    integers = unpack(blocks.packed, type_.bits).float()
    if blocks.zero_points is None:
        zeros = torch.full_like(scales, 2 ** (type_.bits - 1))
    else:
        zeros = unpack(blocks.zero_points, type_.bits)[:, : scales.shape[1]].float()
    return ((integers - zeros[..., None]) * scales[..., None]).flatten(1)


def column_scales(checkpoint: Checkpoint, name: str) -> Tensor:
    """What to divide the columns of a matrix by before it is rounded in blocks along its rows: (C,), mean 1.

    From a sample of the rows when there are very many.

    A few columns of an embedding can be dozens of times larger than the others; the block that holds one has
    steps too wide for all its neighbours. With e_j the size of column j, the error of a block grows like
    sum(c_j^2) * sum(e_j^2 / c_j^2), which is least for c_j = sqrt(e_j) (Cauchy-Schwarz).
    """
    rows, columns = checkpoint.shapes()[name]
    step = max(1, _SCALE_WEIGHTS // columns)
    starts = range(0, rows, step)
    starts = starts[:: -(-len(starts) // _SCALE_SAMPLES)]
    squares = torch.zeros(columns)
    for start in starts:
        squares += checkpoint.float_rows(name, start, min(start + step, rows)).square().sum(0)
    checkpoint.release(name)
    scales = squares.pow(0.25)
    scales = torch.where(torch.isfinite(scales) & (scales > 0), scales, 1.0)
    return scales / scales.mean()


def span(x: Tensor, type_: QuantType) -> Grid:
    """The grid of blocks (R, B, K) from end to end.

    Symmetric: the weight of largest magnitude becomes integer 0, the middle 2^(bits - 1) is zero.
    Asymmetric: the block's smallest and largest weight (and always zero) span the integers.
    """
    return _grid(*_ends(x, type_), type_.bits)


def search(x: Tensor, type_: QuantType, importance: Tensor) -> Grid:
    """The grid of blocks (R, B, K) with the least sum of importance (C,) * error^2 among several.

    Each shrunken range gives integers; for these the best scale has a closed form, sum(i w q) / sum(i q q)
    with q the integers less their zero; with that scale the weights are rounded once more and judged.
    """
    weight = importance.reshape(-1, type_.block_size)  # (B, K)
    first, last = _ends(x, type_)
    best, least = None, None
    for shrink in SHRINKS[type_.bits]:
        grid = _fitted(x, _grid(first * shrink, last * shrink, type_.bits), weight, type_.bits)
        restored = grid.integers(x, type_.bits).sub_(grid.zeros[..., None]).mul_(grid.scales[..., None])
        errors = (restored.sub_(x).square_() * weight).sum(-1)
        if best is None or least is None:
            best, least = grid, errors
            continue
        wins = errors < least
        best = Grid(*(torch.where(wins, new, old) for new, old in zip(grid, best, strict=True)))
        least = torch.where(wins, errors, least)
    assert best is not None
    return best


def _fitted(x: Tensor, grid: Grid, weight: Tensor, bits: int) -> Grid:
    """The grid with each block's scale moved to where the integers it gives fit best."""
    q = grid.integers(x, bits).sub_(grid.zeros[..., None])
    weighted = q * weight
    scales = (weighted * x).sum(-1) / (weighted * q).sum(-1)
    usable = torch.isfinite(scales) & (scales.abs() >= SMALLEST_STEP)
    return Grid(torch.where(usable, scales, grid.scales), grid.zeros)


def _ends(x: Tensor, type_: QuantType) -> tuple[Tensor, Tensor]:
    """The values (R, B) of integer 0 and of the last integer for the whole range of each block.

    Symmetric is signed: a block whose largest weight is positive gets a negative scale, since only integer 0
    lies a full 2^(bits - 1) steps from the middle; where scales must be positive, integer 0 is the lowest
    value that reaches the block's smallest weight and whose mirror, a step less, reaches the largest.
    """
    low, high = torch.aminmax(x, dim=-1)
    if not type_.symmetric:
        return low.clamp(max=0), high.clamp(min=0)
    middle = 2 ** (type_.bits - 1)
    if type_.positive:
        extreme = torch.minimum(low, high * (-middle / (middle - 1)))
    else:
        extreme = torch.where(high > -low, high, low)
    return extreme, extreme * (-(middle - 1) / middle)


def _grid(first: Tensor, last: Tensor, bits: int) -> Grid:
    """The grid from the values (R, B) of integer 0 and of the last integer; zero is on it."""
    levels = 2**bits - 1
    scales = last / levels - first / levels  # the difference itself could overflow
    scales = torch.where(scales.abs() < SMALLEST_STEP, 0.0, scales)
    return Grid(scales, (-first * inverse_of(scales)).round_())


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
