"""A checkpoint becomes an ONNX artifact: `model.onnx` (the graph) and `model.onnx_data` (the weights).

Streams: places are planned first, then rows are read, quantized and written to where they belong, a few
hundred thousand weights at a time on a few threads. No float copy of the model ever exists. Knows neither
the operators (onnx_graph.py), nor the arithmetic of the types (blockwise.py), nor what verification checks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.blockwise import quantize
from export.common import (
    Progress,
    Verify,
    copy_side_files,
    finish,
    make_manifest,
    needed_bytes,
    one_torch_thread,
    tensor_bytes,
    versions,
    write_at,
)
from export.onnx_clients import OPTIMUM, client_notes, write_client_files
from export.onnx_graph import build_graph
from export.onnx_layout import COS, SIN, Layout, Matrix, Range, plan
from fox_edge.artifact import Artifact, ArtifactWriter, TensorRecord
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.errors import RecipeError
from fox_edge.model import rotary_tables
from fox_edge.processors import available_cores
from fox_edge.quant import ONNX, Assignment, Recipe

MODEL_FILE = "model.onnx"
# The name under which Optimum and transformers.js look for a model's weights.
DATA_FILE = "model.onnx_data"
# Weights per task: its float32 rows and the quantizer's temporaries stay in a core's cache.
TASK_WEIGHTS = 1 << 17


def export_onnx(
    checkpoint: Checkpoint,
    target: Path,
    recipe: Recipe,
    *,
    replace: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    verify: Verify | None = None,
    compat: Collection[str] = (),
) -> Artifact:
    """Write the artifact folder `target`; `verify` looks at it before it gets its name.

    `compat` names clients of onnx_clients.COMPAT that get a graph which costs others something.
    `progress(done_bytes, total_bytes)` counts the checkpoint's bytes. Raises RecipeError, CheckpointError
    (a NaN weight), ArtifactError (the target), VerificationError; then nothing is left behind.
    """
    if recipe.format != ONNX:
        raise RecipeError(f"recipe {recipe.name} is for {recipe.format}, but an ONNX export was asked for")
    config = checkpoint.config
    if config.head_dim % 16:
        raise RecipeError(
            f"head_dim is {config.head_dim}, but ONNX Runtime's attention takes multiples of 16 only"
        )
    assignments = recipe.resolve(checkpoint.shapes())
    layout = plan(config, assignments)
    with ArtifactWriter(target, replace) as writer:
        writer.need(needed_bytes(checkpoint, assignments) + layout.table_bytes)
        padded = OPTIMUM in compat
        model = build_graph(config, layout, DATA_FILE, padded=padded)
        (writer.folder / MODEL_FILE).write_bytes(model.SerializeToString())
        _write_data(writer.folder / DATA_FILE, checkpoint, layout, threads or available_cores(), progress)
        copy_side_files(writer, checkpoint)
        write_client_files(writer.folder, config, checkpoint.tokenizer(), layout, DATA_FILE, padded=padded)
        manifest = make_manifest(
            checkpoint,
            recipe,
            model_file=MODEL_FILE,
            tensors=_records(checkpoint, layout, assignments),
            checkpoint_sha256=checkpoint.digest(),
            versions=versions("onnx", "torch", "numpy"),
            notes=client_notes(writer.folder, compat),
        )
        return finish(writer, checkpoint, manifest, verify)


def _records(
    checkpoint: Checkpoint, layout: Layout, assignments: dict[str, Assignment]
) -> Iterator[TensorRecord]:
    """One record per checkpoint tensor; the rows of a stack count their own share of its bytes."""
    for name, shape in checkpoint.shapes().items():
        given = assignments[name]
        stored = name if len(shape) == 1 else layout.matrix_of(name).stored_as(name)
        yield TensorRecord(
            name, stored, shape, given.type.name, tensor_bytes(name, shape, given), given.reason
        )


@dataclass(frozen=True)
class _Task:
    """Rows [start, stop) of one checkpoint tensor, and the matrix (None: a vector) they belong to."""

    source: str
    start: int
    stop: int
    matrix: Matrix | None


def _tasks(layout: Layout) -> Iterator[_Task]:
    """Every row of every tensor, in the order of the data file."""
    for name in layout.vectors:
        yield _Task(name, 0, 1, None)
    for matrix in layout.matrices.values():
        step = max(1, TASK_WEIGHTS // matrix.columns)
        for source, rows in zip(matrix.sources, matrix.source_rows, strict=True):
            for start in range(0, rows, step):
                yield _Task(source, start, min(start + step, rows), matrix)


def _write_data(
    path: Path, checkpoint: Checkpoint, layout: Layout, threads: int, progress: Progress | None
) -> None:
    """Fill the data file; the tasks run side by side, their results are awaited in order."""
    shapes = checkpoint.shapes()
    weight_bytes = {name: checkpoint.dtype(name).itemsize for name in shapes}
    total = sum(weight_bytes[name] * int(np.prod(shape)) for name, shape in shapes.items())
    done = 0
    with path.open("wb") as file, one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        file.truncate(layout.nbytes)
        handle = file.fileno()
        _write_tables(handle, checkpoint.config, layout)
        started: list[tuple[_Task, Future[None]]] = [
            (task, pool.submit(_run, task, checkpoint, layout, handle)) for task in _tasks(layout)
        ]
        try:
            for task, future in started:
                future.result()
                rows, columns = task.stop - task.start, shapes[task.source][-1]
                done += rows * columns * weight_bytes[task.source]
                if progress is not None:
                    progress(done, total)
                if task.matrix is not None and task.stop == shapes[task.source][0]:
                    checkpoint.release(task.source)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _run(task: _Task, checkpoint: Checkpoint, layout: Layout, handle: int) -> None:
    """Read, quantize and write the rows of one task."""
    rows = checkpoint.float_rows(task.source, task.start, task.stop)
    matrix = task.matrix
    if matrix is None:
        _write(handle, layout.vectors[task.source], 0, rows.reshape(-1))
        return
    first = matrix.first_row(task.source) + task.start
    if matrix.scales is None:
        _write(handle, matrix.weight, first, rows)
        return
    blocks = quantize(rows, matrix.type)
    _write(handle, matrix.weight, first, blocks.packed)
    _write(handle, matrix.scales, first, blocks.scales)
    if matrix.zero_points is not None and blocks.zero_points is not None:
        _write(handle, matrix.zero_points, first, blocks.zero_points)


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
