"""The order in which a checkpoint's weights are read, rounded and written, whatever the format.

Three ways of rounding, from quick to good. `nearest` looks at the weights only. `search` knows which columns
of each matrix matter, and spends each block's grid on them. `compensated` runs calibration text through the
model twice, as it is and as it is being rounded, layer by layer, so that each matrix makes good what came
before it. Knows the checkpoint and the order of the work; not which way was asked for (guidance.py), nor the
arithmetic (compensate.py), nor how a format stores weights: that is its `Target`'s.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from export.common import Progress, one_torch_thread
from export.compensate import Compensation, gram, importance
from export.guidance import Guidance, embeddings, mean_squares, walk_text
from fox_edge.calibration import Calibration
from fox_edge.checkpoint import Checkpoint
from fox_edge.heap import trim_heap
from fox_edge.progress import say
from fox_edge.quant import COMPENSATED, EMBEDDING, HEAD
from fox_edge.resume import Journal
from fox_edge.walk import native_product, original, walk

# With compensation a task goes column by column, each a handful of calls: more rows make them worth it.
COMPENSATED_ROWS = 2048
# Tasks after which the memory of what was read is given back: a large matrix is never in memory as a whole.
_RELEASE_TASKS = 64
# Matrices whose tasks wait side by side, so that the end of one does not idle the threads.
_MATRICES = 4
# A tied matrix is rounded for the head's input; but its rows are inputs too, where all columns count alike.
TIED_DAMPING = 0.1
# What these matrices read, no other does.
_READ_ALONE = ("o_proj.weight", "down_proj.weight")
# How many times longer a matrix of 2,048 columns takes to be rounded with compensation than one stream takes
# through it: measured at Fox-1's shape. The embedding's rows share one guide; a layer's inputs have one each.
_EMBEDDING_COST, _LAYER_COST = 2.4, 12.0
# A rounding of one matrix: None, the importance of its columns (C,), or all that compensation needs.
Guide: TypeAlias = Tensor | Compensation | None


class Target(Protocol):
    """A format's file, which takes rows in any order and from several threads."""

    def is_rounded(self, name: str) -> bool:
        """Whether a tensor is stored as integers, so that a guide changes anything."""
        ...

    def task_rows(self, name: str, guide: Guide) -> int:
        """How many rows of a matrix make a task."""
        ...

    def column_scales(self, name: str) -> Tensor | None:
        """What the columns of a matrix are divided by before it is rounded (C,); None: nothing."""
        ...

    def put(self, name: str, start: int, rows: Tensor, guide: Guide, keep: Tensor | None) -> Tensor | None:
        """Round float32 rows (n, C), the tensor's from `start`, and write them.

        A vector is one row. Returns the rows numbered `keep`, counted from `start`, as they can be read back;
        nothing, not even an empty tensor, when none are wanted: thousands of small results between large
        temporaries would scatter the heap until it has the size of the matrix.
        """
        ...


class Rounding:
    """One export's tensors on their way into a target.

    `progress(done, total)` counts the work in the bytes of the checkpoint, or with compensation in the time
    that its parts take relative to each other.
    """

    def __init__(
        self, checkpoint: Checkpoint, target: Target, threads: int, progress: Progress | None = None
    ) -> None:
        self.checkpoint, self.target, self.progress = checkpoint, target, progress
        self.pool = ThreadPoolExecutor(threads)
        self.shapes = checkpoint.shapes()
        self.head = EMBEDDING if checkpoint.config.tied else HEAD
        self.done = self.total = 0

    def __enter__(self) -> Rounding:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def nearest(self, mean_squares: Mapping[str, Tensor] | None = None) -> None:
        """All tensors in the checkpoint's order; those with mean squares (C,) weigh their columns' errors."""
        squares = dict(mean_squares or {})
        if squares:
            squares.setdefault(EMBEDDING, torch.ones(self.shapes[EMBEDDING][1]))
        self.total += sum(self._bytes(name) for name in self.shapes)
        waiting: deque[tuple[str, list[Future[Tensor | None]]]] = deque()
        with one_torch_thread():
            for name in self.shapes:
                guided = self._is_guided(name) and name in squares
                waiting.append((name, self._start(name, self._importance(name, squares) if guided else None)))
                if len(waiting) == _MATRICES:
                    self._finish(*waiting.popleft())
            while waiting:
                self._finish(*waiting.popleft())

    def mean_squares(self, calibration: Calibration) -> dict[str, Tensor]:
        """As the function of this name, counted as work."""
        self.total += sum(self._bytes(name) for name in self._layer_names())
        return mean_squares(self.checkpoint, calibration, lambda name: self._tell(self._bytes(name)))

    def compensated(self, calibration: Calibration, journal: Journal | None = None) -> None:
        """The tied matrix first, then layer after layer behind what is already rounded.

        With a journal, the work goes on behind the last layer that it has.
        """
        layer, streams = journal.last() if journal is not None else (0, None)
        names = [n for n in self._layer_names() if int(n.split(".")[2]) >= layer]
        self.total = sum(self._cost(name) for name in names)
        if streams is None:
            streams = self._embedded(calibration)
            if journal is not None:
                journal.write(0, streams)
        for name, shape in self.shapes.items():
            if len(shape) == 1:
                self.target.put(name, 0, self.checkpoint.float_rows(name), None, None)
        behind = _Behind(self)
        after = journal.write if journal is not None else None
        hidden = walk(
            self.checkpoint,
            streams,
            behind.visit,
            product=native_product,
            first_layer=layer,
            after_layer=after,
        )
        if not self.checkpoint.config.tied:
            behind.visit(HEAD, [self._as_head_reads(stream) for stream in hidden])

    def round(self, name: str, guide: Guide, wanted: Tensor) -> Tensor:
        """Write one matrix and return its rows `wanted` (sorted) as they have been rounded."""
        with one_torch_thread():
            return torch.cat(self._finish(name, self._start(name, guide, wanted), tell=False))

    def _embedded(self, calibration: Calibration) -> Tensor:
        """Round the embedding; the calibration text as it enters the first layer, exact and rounded."""
        guide: Guide = None
        self.total += self._cost(EMBEDDING)
        if self._is_guided(EMBEDDING):
            guide = torch.ones(self.shapes[EMBEDDING][1])
            if self.checkpoint.config.tied:
                guide = self._head_guide(calibration)
        ids, places = torch.unique(calibration.windows, return_inverse=True)
        rounded = self.round(EMBEDDING, guide, ids)
        self._tell(self._cost(EMBEDDING))
        return torch.stack([embeddings(self.checkpoint, ids)[places], rounded[places]])

    def _head_guide(self, calibration: Calibration) -> Compensation:
        """For a tied matrix: what the head reads when nothing is rounded yet."""
        names = self._layer_names()
        self.total += sum(self._walk_cost(name) for name in names)

        def visit(name: str, _: Sequence[Tensor]) -> Sequence[Tensor]:
            weights = original(self.checkpoint, name)
            self._tell(self._walk_cost(name))
            return [weights]

        hidden = walk_text(self.checkpoint, calibration, visit)
        return Compensation.of(gram(self._as_head_reads(hidden)), TIED_DAMPING)

    def _importance(self, name: str, squares: Mapping[str, Tensor]) -> Tensor:
        """What an error in each column costs (C,), where the head's columns may have scales."""
        scales = self.target.column_scales(name) if name == self.head else None
        return importance(squares[name] if scales is None else squares[name] * scales.square())

    def _as_head_reads(self, hidden: Tensor) -> Tensor:
        scales = self.target.column_scales(self.head)
        return hidden if scales is None else hidden * scales

    def _is_guided(self, name: str) -> bool:
        return len(self.shapes[name]) == 2 and self.target.is_rounded(name)

    def _layer_names(self) -> list[str]:
        """The matrices of all layers."""
        return [
            name
            for name, shape in self.shapes.items()
            if len(shape) == 2 and name not in (EMBEDDING, self.head)
        ]

    def _bytes(self, name: str) -> int:
        """Of a tensor in the checkpoint."""
        shape = self.shapes[name]
        return shape[0] * shape[-1] ** (len(shape) - 1) * self.checkpoint.dtype(name).itemsize

    def _walk_cost(self, name: str) -> int:
        """Of taking one stream through a matrix."""
        rows, columns = self.shapes[name]
        return rows * columns

    def _cost(self, name: str) -> int:
        """Of rounding a matrix with compensation and taking two streams through it."""
        rows, columns = self.shapes[name]
        per_weight = (1 + columns / 2048) / 2
        if name == EMBEDDING:
            return int(_EMBEDDING_COST * per_weight * rows * columns)
        return int((2 + _LAYER_COST * per_weight) * rows * columns)

    def _start(self, name: str, guide: Guide, wanted: Tensor | None = None) -> list[Future[Tensor | None]]:
        """Queue a tensor's rows; each task returns those of its rounded rows that are wanted."""
        shape = self.shapes[name]
        rows = shape[0] if len(shape) == 2 else 1
        step = self.target.task_rows(name, guide)
        return [
            self.pool.submit(self._task, name, start, min(start + step, rows), guide, wanted)
            for start in range(0, rows, step)
        ]

    def _task(self, name: str, start: int, stop: int, guide: Guide, wanted: Tensor | None) -> Tensor | None:
        with torch.inference_mode():
            rows = self.checkpoint.float_rows(name, start, stop)
            keep = None
            if wanted is not None:
                keep = wanted[(wanted >= start) & (wanted < stop)] - start
                keep = keep if len(keep) else None
            return self.target.put(name, start, rows, guide, keep)

    def _finish(self, name: str, tasks: list[Future[Tensor | None]], tell: bool = True) -> list[Tensor]:
        """Wait for a tensor; the results in the order of its rows."""
        found, told, size = [], 0, self._bytes(name)
        for n, task in enumerate(tasks):
            rows = task.result()
            if rows is not None:
                found.append(rows)
            if n % _RELEASE_TASKS == _RELEASE_TASKS - 1:
                self.checkpoint.release(name)
            if tell:
                share = size * (n + 1) // len(tasks)
                self._tell(share - told)
                told = share
        self.checkpoint.release(name)
        return found

    def _tell(self, work: int) -> None:
        self.done += work
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Behind:
    """Rounds the matrices that a walk comes to, each for the inputs that it finds there."""

    def __init__(self, work: Rounding) -> None:
        self.work = work
        self.input: Tensor | None = None
        self.guide: Guide = None

    def visit(self, name: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Write a matrix; returns what it was and what it has become."""
        work, (exact, rounded) = self.work, inputs
        guide: Guide = None
        if work._is_guided(name):
            # Holding on to the input, so that no other can come to lie at its address.
            if self.input is None or self.input.data_ptr() != rounded.data_ptr():
                self.input, self.guide = rounded, None  # the old one's memory goes first
                self.guide = Compensation.behind(exact, rounded)
            guide = self.guide
        after = work.round(name, guide, torch.arange(work.shapes[name][0]))
        trim_heap()
        if name.endswith(_READ_ALONE):
            self.input, self.guide = None, None
        if name != HEAD:
            work._tell(work._cost(name))
        return [original(work.checkpoint, name), after]


def write_weights(
    place: Path,
    artifact: Path,
    checkpoint: Checkpoint,
    guidance: Guidance,
    identity: Mapping[str, Any],
    *,
    prepare: Callable[[Path], None],
    target: Callable[[int], Target],
    threads: int,
    progress: Progress | None = None,
) -> None:
    """Fill the file `place` with an export's weights.

    `prepare(path)` creates it with everything else in it, `target(handle)` takes the rows. Compensated work
    that was cut off goes on where it was when it is asked for again for the same `artifact`; `identity` is
    what else it depends on, as JSON values.
    """
    if guidance.rounding != COMPENSATED:
        prepare(place)
        with _opened(place) as handle, Rounding(checkpoint, target(handle), threads, progress) as work:
            squares = guidance.mean_squares
            if squares is None and guidance.calibration is not None:
                squares = work.mean_squares(guidance.calibration)
            work.nearest(squares)
        return
    assert guidance.calibration is not None
    whole = {**identity, **guidance.to_json(), "place": place.name, "checkpoint": _fingerprint(checkpoint)}
    with Journal(artifact, whole) as journal:
        layer, streams = journal.last()
        if streams is None:
            prepare(journal.file)
        else:
            say(f"going on behind layer {layer} of {checkpoint.config.num_layers}, where it was cut off")
        del streams
        with (
            _opened(journal.file) as handle,
            Rounding(checkpoint, target(handle), threads, progress) as work,
        ):
            work.compensated(guidance.calibration, journal)
        journal.done(place)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDWR)
    try:
        yield handle
    finally:
        os.close(handle)


def _fingerprint(checkpoint: Checkpoint) -> list[list[str | int]]:
    """What changes when a checkpoint does; hashing it would take as long as reading it."""
    files = sorted(path for path in checkpoint.path.iterdir() if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
