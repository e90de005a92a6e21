"""How a matrix lies on the device: floats, or integers of 4 or 8 bits with scales (and offsets) per block.

Knows the two kinds of `ops.Matrix`, and how rows are put into them; not where rows come from, nor which
tensor gets which form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fox_edge.blockwise import pack
from fox_edge.errors import ArtifactError
from runtimes.cuda.ops import Dense, Matrix, Packed

# Gives a tensor of this shape and type on the device.
Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


class Levels(NamedTuple):
    """Rows as a file stores them, unpacked: value = integer * scale + offset, per block of columns."""

    integers: Tensor  # uint8 (n, C)
    scales: Tensor  # float32 (n, C / block)
    offsets: Tensor | None = None  # float32 (n, C / block); None: -zero * scale
    zero: int = 0

    def values(self) -> Tensor:
        """The weights (n, C), float32."""
        blocks = self.integers.view(*self.scales.shape, -1).float()
        if self.offsets is None:
            return ((blocks - self.zero) * self.scales[..., None]).flatten(1)
        return (blocks * self.scales[..., None] + self.offsets[..., None]).flatten(1)


@dataclass(frozen=True)
class Form:
    """One way for a matrix to lie. `bits` 0: floats of the session's type.

    `half`: scales and offsets are float16, which only some types' are exactly. `symmetric`: no offsets.
    `scaled`: each column has a factor.
    """

    bits: int = 0
    block: int = 0
    half: bool = False
    symmetric: bool = True
    scaled: bool = False

    @property
    def zero(self) -> int:
        """The integer that stands for 0 where there are no offsets."""
        return 1 << (self.bits - 1)

    def join(self, other: Form) -> Form:
        """The narrowest form that holds rows of both exactly."""
        if not self.bits or not other.bits:
            return FLOATS
        return Form(
            max(self.bits, other.bits),
            min(self.block, other.block),
            self.half and other.half,
            self.symmetric and other.symmetric,
        )

    def make(self, rows: int, columns: int, dtype: torch.dtype, take: Allocate) -> Matrix:
        """A matrix of this form, not filled."""
        if not self.bits:
            return Dense(take((rows, columns), dtype))
        kind = torch.float16 if self.half else torch.float32
        integers = take((rows, columns * self.bits // 8), torch.uint8)
        scales = take((rows, columns // self.block), kind)
        offsets = None if self.symmetric else take((rows, columns // self.block), kind)
        factors = take((columns,), torch.float32) if self.scaled else None
        return Packed(integers, scales, offsets, self.bits, self.block, factors)


FLOATS = Form()


def put(matrix: Matrix, first: int, rows: Tensor | Levels, name: str) -> None:
    """Write rows into a matrix from row `first` on; `name` is what an error speaks of.

    Raises ArtifactError for scales that are no numbers, or too large for the matrix.
    """
    if isinstance(matrix, Dense):
        values = rows.values() if isinstance(rows, Levels) else rows
        matrix.weight[first : first + len(values)].copy_(values)
        return
    assert isinstance(rows, Levels), f"{name}: floats for a matrix of integers"
    last, integers = first + len(rows.integers), rows.integers
    if matrix.offsets is None:
        assert rows.offsets is None, f"{name}: offsets for a symmetric matrix"
        integers = integers + (matrix.zero - rows.zero)
    else:
        offsets = -rows.zero * rows.scales if rows.offsets is None else rows.offsets
        _put_scales(matrix.offsets[first:last], offsets, name)
    _put_scales(matrix.scales[first:last], rows.scales, name)
    matrix.integers[first:last].copy_(pack(integers, matrix.bits))


def _put_scales(held: Tensor, given: Tensor, name: str) -> None:
    """Scales or offsets, of the same blocks or of wider ones, each then several times."""
    stored = given.to(held.dtype)
    bad = given[~torch.isfinite(stored)]
    if bad.numel():
        raise ArtifactError(f"{name}: a block's scale is {float(bad[0]):g}, which is none of weights")
    held.copy_(stored.repeat_interleave(held.shape[1] // given.shape[1], dim=1))
