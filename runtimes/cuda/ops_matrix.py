"""The two forms that a matrix of the model has on a device: plain numbers, or integers in blocks.

Shapes and bytes only. Who fills the tensors, and what multiplies by them, is others' business.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Dense(NamedTuple):
    """Rows of plain numbers."""

    weight: Tensor  # (N, C), bfloat16 (float32 in tests)

    @property
    def rows(self) -> int:
        """Outputs, N."""
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        """Inputs, C."""
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that one product has to read."""
        return self.weight.nbytes


class Packed(NamedTuple):
    """Rows of integers in blocks: value = (integer * scale + offset) * column factor.

    One scale and one offset for `block` neighbours of a row. Offsets are -zero_point * scale, or ggml's
    -min. Without offsets the integers are symmetric, offset = -2^(bits - 1) * scale: that saves reading them.
    """

    integers: Tensor  # uint8 (N, C * bits // 8); 4 bits: lowest nibble first
    scales: Tensor  # float32 or float16 (N, C // block)
    offsets: Tensor | None  # like the scales; None: symmetric
    bits: int  # 4 or 8
    block: int  # 16, 32, 64, 128 or 256
    factors: Tensor | None = None  # float32 (C,): what the exporter had divided the columns by

    @property
    def rows(self) -> int:
        """Outputs, N."""
        return self.integers.shape[0]

    @property
    def columns(self) -> int:
        """Inputs, C."""
        return self.integers.shape[1] * 8 // self.bits

    @property
    def zero(self) -> int:
        """The integer that stands for 0 in a symmetric block."""
        return 1 << (self.bits - 1)

    @property
    def nbytes(self) -> int:
        """Bytes that one product has to read."""
        return sum(
            t.nbytes for t in (self.integers, self.scales, self.offsets, self.factors) if t is not None
        )


Matrix = Dense | Packed
