"""Our own block quantizer with an eye on the input: rounding that the other columns make good.

The grids and the packing are fox_edge/blockwise.py's, the order of rounding compensate.py's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from export.compensate import Compensation, Steps, choose, refit
from fox_edge.blockwise import Blocks, Grid, search, store
from fox_edge.quant import QuantType


def quantize_compensated(rows: Tensor, type_: QuantType, guide: Compensation) -> Blocks:
    """Round float32 rows (R, C) to integers of a type so that their product with the input changes least."""
    type_.row_bytes("rows", rows.shape[1])
    rows = guide.target(rows)
    grid = search(rows.reshape(rows.shape[0], -1, type_.block_size), type_, guide.importance)
    steps = Steps(grid.scales, -grid.zeros * grid.scales, 2**type_.bits)
    integers = choose(rows, steps, guide).view(*grid.scales.shape, -1)
    (scales,) = refit(rows, [integers - grid.zeros[..., None]], [grid.scales], guide)
    if type_.positive:
        scales = torch.where(scales > 0, scales, grid.scales)
    return store(integers, Grid(scales, grid.zeros), type_)
