"""Rounded weights on their way into a .pte: the integers and scales that XNNPACK's kernels read.

4-bit integers lie two to a byte, the first in the low half, 8 above their value, with a bfloat16 scale per
block of a row; 8-bit ones as they are, with a float32 scale per row. Knows this layout and the ranges of the
file; not how integers are chosen (blockwise.py), nor who reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.blockwise import quantize_compensated
from export.common import write_at
from export.compensate import Compensation
from export.pte_file import Place
from export.rounding import COMPENSATED_ROWS, Guide
from fox_edge.blockwise import Blocks, column_scales, dequantize, quantize
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import QuantType

# Weights per task: its float32 rows and the quantizer's temporaries stay in a core's cache.
TASK_WEIGHTS = 1 << 17
# Of one scale, by the bits of the integers: bfloat16 for 4, float32 for 8.
SCALE_BYTES = {4: 2, 8: 4}
# A block of zeros needs a scale too: XNNPACK takes none that is 0 or below float32's normal numbers. Its
# integers are then the ones in the middle, by the byte.
_SMALLEST_SCALE = 2.0**-100
_MIDDLE = {4: 0x88, 8: 0x80}


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its type for rows of its length, where it lies, and where its scales do."""

    shape: tuple[int, ...]
    type: QuantType
    place: Place
    scales: Place | None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row without its scales."""
        return self.shape[-1] * (self.type.bits or 32) // 8

    @property
    def scale_row_bytes(self) -> int:
        """Bytes of one row's scales."""
        return self.shape[-1] // self.type.block_size * SCALE_BYTES[self.type.bits]

    @property
    def nbytes(self) -> int:
        """Scales included."""
        return self.place.nbytes + (self.scales.nbytes if self.scales else 0)

    def to_json(self) -> dict[str, Any]:
        """Where and how it is stored, for those who read the file themselves."""
        rows, columns = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        told: dict[str, Any] = {"offset": self.place.offset, "rows": rows, "columns": columns}
        if self.scales is None:
            return told | {"layout": "f32"}
        four = self.type.bits == 4
        return told | {
            "layout": "qb4w" if four else "qc8w",
            "block": self.type.block_size,
            "scales_offset": self.scales.offset,
            "scales_type": "bf16" if four else "f32",
        }


class PteTarget:
    """The file of an export, begun; see `rounding.Target`.

    `scaled` names the matrix whose columns are divided by factors, which go to `factors`.
    """

    def __init__(
        self,
        handle: int,
        checkpoint: Checkpoint,
        tensors: dict[str, Stored],
        scaled: str | None,
        factors: Place | None,
    ) -> None:
        self.handle, self.tensors, self.scaled = handle, tensors, scaled
        self.factors = None
        if scaled is not None and factors is not None:
            self.factors = column_scales(checkpoint, scaled)
            self._write(self.factors, factors.offset)

    def is_rounded(self, name: str) -> bool:
        """Whether a tensor is stored as integers."""
        return self.tensors[name].type.bits > 0

    def task_rows(self, name: str, guide: Guide) -> int:
        """Rows of one task."""
        step = max(1, TASK_WEIGHTS // self.tensors[name].shape[-1])
        return max(step, COMPENSATED_ROWS) if isinstance(guide, Compensation) else step

    def column_scales(self, name: str) -> Tensor | None:
        """What the columns of a matrix are divided by (C,)."""
        return self.factors if name == self.scaled else None

    def put(self, name: str, start: int, rows: Tensor, guide: Guide, keep: Tensor | None) -> Tensor | None:
        """Round and write rows (n, C); returns those that are to be kept as they can be read back."""
        stored = self.tensors[name]
        if stored.scales is None:
            self._write(rows, stored.place.offset + start * stored.row_bytes)
            return None if keep is None else rows[keep]
        factors = self.column_scales(name)
        blocks = round_rows(rows if factors is None else rows / factors, stored.type, guide)
        self._write(as_stored(blocks, stored.type), stored.place.offset + start * stored.row_bytes)
        scales = blocks.scales.bfloat16().view(torch.int16) if stored.type.bits == 4 else blocks.scales
        self._write(scales, stored.scales.offset + start * stored.scale_row_bytes)
        if keep is None:
            return None
        restored = dequantize(Blocks(blocks.packed[keep], blocks.scales[keep], None), stored.type)
        return restored if factors is None else restored * factors

    def _write(self, values: Tensor, offset: int) -> None:
        write_at(self.handle, memoryview(values.contiguous().numpy()).cast("B"), offset)


def round_rows(rows: Tensor, type_: QuantType, guide: Guide) -> Blocks:
    """Float32 rows (R, C) to integers and scales that the file can hold to the bit."""
    if isinstance(guide, Compensation):
        blocks = quantize_compensated(rows, type_, guide)
    else:
        blocks = quantize(rows, type_, guide)
    packed = torch.where((blocks.scales == 0)[..., None], _MIDDLE[type_.bits], blocks.packed)
    scales = blocks.scales.clamp(min=_SMALLEST_SCALE)
    return Blocks(packed, scales.bfloat16().float() if type_.bits == 4 else scales, None)


def as_stored(blocks: Blocks, type_: QuantType) -> Tensor:
    """The bytes of the integers: 4-bit ones are packed so already, 8-bit ones lose their offset."""
    return blocks.packed if type_.bits == 4 else blocks.packed ^ 0x80
