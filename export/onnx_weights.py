"""An ONNX artifact's data file, filled: rows are rounded and written to the places that were planned.

Knows where a row lies and what its type makes of it; not the order of the work (rounding.py), nor the
arithmetic (fox_edge/blockwise.py), nor the operators that read the file.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from export.blockwise import quantize_compensated
from export.common import write_at
from export.compensate import Compensation
from export.onnx_layout import COS, SIN, Layout, Range
from export.rounding import COMPENSATED_ROWS, Guide
from fox_edge.blockwise import Blocks, column_scales, dequantize, quantize
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.model import rotary_tables
from fox_edge.quant import QuantType

# Weights per task: its float32 rows and the quantizer's temporaries stay in a core's cache.
TASK_WEIGHTS = 1 << 17


class OnnxTarget:
    """The data file of an export; see `rounding.Target`."""

    def __init__(self, handle: int, checkpoint: Checkpoint, layout: Layout) -> None:
        self.handle, self.layout = handle, layout
        os.ftruncate(handle, layout.nbytes)
        _write_tables(handle, checkpoint.config, layout)
        self.scales = {name: column_scales(checkpoint, name) for name in layout.column_scales}
        for name, scales in self.scales.items():
            _write(handle, layout.column_scales[name], 0, scales)

    def is_rounded(self, name: str) -> bool:
        """Whether a matrix is stored as integers."""
        return self.layout.matrix_of(name).scales is not None

    def task_rows(self, name: str, guide: Guide) -> int:
        """Rows of one task."""
        if name in self.layout.vectors:
            return 1
        step = max(1, TASK_WEIGHTS // self.layout.matrix_of(name).columns)
        return max(step, COMPENSATED_ROWS) if isinstance(guide, Compensation) else step

    def column_scales(self, name: str) -> Tensor | None:
        """What the columns of a matrix are divided by (C,)."""
        return self.scales.get(name)

    def put(self, name: str, start: int, rows: Tensor, guide: Guide, keep: Tensor | None) -> Tensor | None:
        """Round and write rows (n, C); returns those that are to be kept as they can be read back."""
        if name in self.layout.vectors:
            _write(self.handle, self.layout.vectors[name], 0, rows.reshape(-1))
            return None
        matrix = self.layout.matrix_of(name)
        first = matrix.first_row(name) + start
        if matrix.scales is None:
            _write(self.handle, matrix.weight, first, rows)
            return None if keep is None else rows[keep]
        columns = self.scales.get(name)
        blocks = _quantize(rows if columns is None else rows / columns, matrix.type, guide)
        _write(self.handle, matrix.weight, first, blocks.packed)
        _write(self.handle, matrix.scales, first, blocks.scales)
        points = blocks.zero_points
        if matrix.zero_points is not None and points is not None:
            _write(self.handle, matrix.zero_points, first, points)
        if keep is None:
            return None
        kept = Blocks(blocks.packed[keep], blocks.scales[keep], None if points is None else points[keep])
        restored = dequantize(kept, matrix.type)
        return restored if columns is None else restored * columns


def _quantize(rows: Tensor, type_: QuantType, guide: Guide) -> Blocks:
    if isinstance(guide, Compensation):
        return quantize_compensated(rows, type_, guide)
    return quantize(rows, type_, guide)


def _write_tables(handle: int, config: FoxConfig, layout: Layout) -> None:
    """The rotary tables, a few thousand positions at a time."""
    for start in range(0, config.max_positions, 4096):
        positions = torch.arange(start, min(start + 4096, config.max_positions))
        for name, table in zip((COS, SIN), rotary_tables(config, positions), strict=True):
            _write(handle, layout.tables[name], start, table)


def _write(handle: int, at: Range, first_row: int, rows: Tensor) -> None:
    """Put rows into their range of the file."""
    data = memoryview(rows.contiguous().numpy()).cast("B")
    offset = at.offset + first_row * at.row_bytes
    assert offset + len(data) <= at.offset + at.nbytes, at.name
    write_at(handle, data, offset)
