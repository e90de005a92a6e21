"""An ONNX artifact's data file, filled: rows are read, rounded and written to the places that were planned.

Three ways of rounding, from quick to good. `nearest` looks at the weights only. `search` first runs a little
calibration text through the reference, and spends each block's grid on the columns that matter. `compensated`
runs more of it through the model as it is being rounded, layer by layer, so that each matrix makes good what
came before it. Matrices of 8 bits and more are always rounded to nearest: nothing is left to gain there.
Knows the order of the work; not the arithmetic (blockwise.py, compensate.py), nor the operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from export.blockwise import Blocks, dequantize, quantize, quantize_compensated
from export.calibration import MEAN_SQUARE_TOKENS, Calibration, Visit, walk
from export.common import Progress, one_torch_thread, write_at
from export.compensate import Compensation, gram, importance
from export.onnx_layout import COS, SIN, Layout, Matrix, Range
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.model import rotary_tables
from fox_edge.quant import COMPENSATED, EMBEDDING, HEAD, NEAREST, SEARCH, QuantType

# Weights per task: its float32 rows and the quantizer's temporaries stay in a core's cache.
TASK_WEIGHTS = 1 << 17
# With compensation a task goes column by column, each a handful of calls: more rows make them worth it.
COMPENSATED_ROWS = 2048
# Tasks after which the memory of what was read is given back: a large matrix is never in memory as a whole.
_RELEASE_TASKS = 64
# A tied matrix is rounded for the head's input; but its rows are inputs too, where all columns count alike.
TIED_DAMPING = 0.05
# Pieces, evenly spread over a matrix, from which the size of its columns is learned, and weights of each.
_SCALE_SAMPLES, _SCALE_WEIGHTS = 256, 1 << 17
# A rounding of one matrix: None, the importance of its columns (C,), or all that compensation needs.
Guide: TypeAlias = Tensor | Compensation | None


def write_weights(
    path: Path,
    checkpoint: Checkpoint,
    layout: Layout,
    *,
    rounding: str,
    calibration: Calibration | None,
    threads: int,
    progress: Progress | None = None,
) -> None:
    """Create the data file; `calibration` is needed unless `rounding` is 'nearest'.

    `progress(done_bytes, total_bytes)` counts the checkpoint's bytes as often as they are read for it.
    """
    with path.open("wb") as file, ThreadPoolExecutor(threads) as pool:
        file.truncate(layout.nbytes)
        work = _Work(file.fileno(), checkpoint, layout, pool, progress)
        _write_tables(file.fileno(), checkpoint.config, layout)
        try:
            if rounding == NEAREST or calibration is None:
                work.nearest()
            elif rounding == SEARCH:
                work.searched(calibration)
            else:
                assert rounding == COMPENSATED, rounding
                work.compensated(calibration)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Work:
    """One export's rows on their way into the file."""

    def __init__(
        self,
        handle: int,
        checkpoint: Checkpoint,
        layout: Layout,
        pool: ThreadPoolExecutor,
        progress: Progress | None,
    ) -> None:
        self.handle, self.checkpoint, self.layout, self.pool = handle, checkpoint, layout, pool
        self.progress = progress
        self.bytes = {
            name: checkpoint.tensor(name).numel() * checkpoint.dtype(name).itemsize
            for name in checkpoint.shapes()
        }
        self.done, self.total = 0, sum(self.bytes.values())
        self.column_scales = {name: column_scales(checkpoint, name) for name in layout.column_scales}

    def nearest(self, guides: dict[str, Tensor] | None = None) -> None:
        """All tensors in the order of the file; with guides, narrow matrices on grids searched by them."""
        with one_torch_thread():
            self._vectors()
            for name in self._matrix_names():
                self._finish(name, self._start(name, (guides or {}).get(name)))

    def searched(self, calibration: Calibration) -> None:
        """A walk with the checkpoint's own weights for the mean squares, then every tensor."""
        self.total += self._layer_bytes()
        squares: dict[str, Tensor] = {}

        def visit(name: str, x: Tensor) -> Tensor:
            squares[name] = x.square().mean(0)
            return self._originals(name)

        hidden = self._walk(calibration.first(MEAN_SQUARE_TOKENS), visit)
        head = EMBEDDING if self.checkpoint.config.tied else HEAD
        squares[head] = (hidden * self.column_scales.get(head, 1.0)).square().mean(0)
        squares.setdefault(EMBEDDING, torch.ones(hidden.shape[1]))
        self.nearest({name: importance(square) for name, square in squares.items() if self.is_narrow(name)})

    def compensated(self, calibration: Calibration) -> None:
        """The tied matrix first, then layer after layer behind what is already rounded."""
        self._vectors()
        config = self.checkpoint.config
        guide: Guide = None
        if self.is_narrow(EMBEDDING):
            guide = self._head_guide(calibration) if config.tied else torch.ones(config.hidden_size)
        ids, places = torch.unique(calibration.windows, return_inverse=True)
        embedded = self.round(EMBEDDING, guide, ids)[places]
        behind = _Behind(self)
        hidden = walk(self.checkpoint, embedded, behind.visit)
        if not config.tied:
            behind.visit(HEAD, hidden * self.column_scales.get(HEAD, 1.0))

    def _head_guide(self, calibration: Calibration) -> Compensation:
        """For a tied matrix: what the head reads when nothing is rounded yet."""
        self.total += self._layer_bytes()
        hidden = self._walk(calibration, lambda name, _: self._originals(name))
        return Compensation.of(gram(hidden * self.column_scales.get(EMBEDDING, 1.0)), TIED_DAMPING)

    def _walk(self, calibration: Calibration, visit: Visit) -> Tensor:
        """A walk that begins at the checkpoint's own embedding."""
        ids, places = torch.unique(calibration.windows, return_inverse=True)
        embedded = self.checkpoint.tensor(EMBEDDING)[ids].float()[places]
        self.checkpoint.release(EMBEDDING)
        return walk(self.checkpoint, embedded, visit)

    def _originals(self, name: str) -> Tensor:
        """A matrix as the checkpoint has it, float32."""
        rows = self.checkpoint.float_rows(name)
        self._tell(name)
        return rows

    def _matrix_names(self) -> Iterator[str]:
        """Checkpoint matrices in the order of the file."""
        for matrix in self.layout.matrices.values():
            yield from matrix.sources

    def is_narrow(self, name: str) -> bool:
        """Whether a matrix is rounded so coarsely that calibration pays."""
        return self.layout.matrix_of(name).type.is_narrow

    def _layer_bytes(self) -> int:
        return sum(size for name, size in self.bytes.items() if name.startswith("model.layers."))

    def _vectors(self) -> None:
        for name, scales in self.column_scales.items():
            _write(self.handle, self.layout.column_scales[name], 0, scales)
        for name, place in self.layout.vectors.items():
            _write(self.handle, place, 0, self.checkpoint.float_rows(name).reshape(-1))
            self._tell(name)

    def _start(self, name: str, guide: Guide, wanted: Tensor | None = None) -> list[Future[Tensor | None]]:
        """Queue a matrix's rows; each task returns those of its rounded rows that are wanted.

        Nothing, not even an empty tensor, when none are: thousands of small results between large temporaries
        would scatter the heap until it has the size of the matrix.
        """
        matrix = self.layout.matrix_of(name)
        rows, columns = self.checkpoint.shapes()[name]
        step = max(1, TASK_WEIGHTS // columns)
        if isinstance(guide, Compensation):
            step = max(step, COMPENSATED_ROWS)
        return [
            self.pool.submit(self._task, name, matrix, start, min(start + step, rows), guide, wanted)
            for start in range(0, rows, step)
        ]

    def _finish(self, name: str, tasks: list[Future[Tensor | None]]) -> list[Tensor]:
        """Wait for a matrix; the results in the order of its rows."""
        found = []
        for n, task in enumerate(tasks):
            rows = task.result()
            if rows is not None:
                found.append(rows)
            if n % _RELEASE_TASKS == 0:
                self.checkpoint.release(name)
        self._tell(name)
        return found

    def round(self, name: str, guide: Guide, wanted: Tensor) -> Tensor:
        """Write one matrix and return its rows `wanted` (sorted) as they have been rounded."""
        with one_torch_thread():
            return torch.cat(self._finish(name, self._start(name, guide, wanted)))

    def _tell(self, name: str) -> None:
        self.checkpoint.release(name)
        self.done += self.bytes[name]
        if self.progress is not None:
            self.progress(self.done, self.total)

    def _task(
        self, name: str, matrix: Matrix, start: int, stop: int, guide: Guide, wanted: Tensor | None
    ) -> Tensor | None:
        """Read, round and write rows [start, stop); returns the wanted ones among them, if any are."""
        with torch.inference_mode():
            rows = self.checkpoint.float_rows(name, start, stop)
            keep = None
            if wanted is not None:
                keep = wanted[(wanted >= start) & (wanted < stop)] - start
            first = matrix.first_row(name) + start
            if matrix.scales is None:
                _write(self.handle, matrix.weight, first, rows)
                return rows[keep] if keep is not None and len(keep) else None
            columns = self.column_scales.get(name)
            blocks = _quantize(rows if columns is None else rows / columns, matrix.type, guide)
            _write(self.handle, matrix.weight, first, blocks.packed)
            _write(self.handle, matrix.scales, first, blocks.scales)
            points = blocks.zero_points
            if matrix.zero_points is not None and points is not None:
                _write(self.handle, matrix.zero_points, first, points)
            if keep is None or not len(keep):
                return None
            kept = Blocks(blocks.packed[keep], blocks.scales[keep], None if points is None else points[keep])
            restored = dequantize(kept, matrix.type)
            return restored if columns is None else restored * columns


class _Behind:
    """Rounds the matrices that a walk comes to, each for the input that it finds there."""

    def __init__(self, work: _Work) -> None:
        self.work = work
        self.input: Tensor | None = None
        self.guide: Guide = None

    def visit(self, name: str, x: Tensor) -> Tensor:
        """Write a matrix; returns what it has become."""
        guide: Guide = None
        if self.work.is_narrow(name):
            # Holding on to the input, so that no other can come to lie at its address.
            if self.input is None or self.input.data_ptr() != x.data_ptr():
                self.input, self.guide = x, None  # the old one's memory goes first
                self.guide = Compensation.of(gram(x))
            guide = self.guide
        rows = self.work.checkpoint.shapes()[name][0]
        return self.work.round(name, guide, torch.arange(rows))


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
