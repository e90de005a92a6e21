"""How a product is run on the device: by which kernel, in what portions, and the search for the quickest.

The kernel follows from the kind of matrix and the number of conversations alone: kernels sum in different
orders, and an answer must not depend on which was quicker on the day. Within a kernel, the ways that `tune`
tries differ in rows, stages and launch, and it keeps one only if its results on random inputs are the first
one's bit by bit. So cuBLAS is no candidate beside our kernels, but has its own range of conversations;
`ops_triton.times` tells what each would take, for whoever moves the borders below. Imports no triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from runtimes.cuda.ops_matrix import Dense, Matrix, Packed

# Up to FEW conversations each has programs of its own (kernels_rows.py); a dense matrix for more than MANY is
# cuBLAS's; all between is kernels_tiles.py's. By reasoning, not measured on a card: two conversations can
# share what the L2 cache holds, which gives about twice the memory's rate; for many, cuBLAS knows the card.
FEW, MANY = 2, 8


class Rows(NamedTuple):
    """kernels_rows.py: rows for a program, of a gate as many again, and warps that share the columns."""

    rows: int
    warps: int = 1
    pdl: bool = False


class Tiles(NamedTuple):
    """kernels_tiles.py: rows of the matrix for a program, of a gate as many again, and columns at a time."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3
    pdl: bool = False


class Library(NamedTuple):
    """cuBLAS, with the norm before and the gate after it as kernels of their own."""


Choice = Rows | Tiles | Library


class Key(NamedTuple):
    """What a choice is for. `inputs`: conversations, rounded up to what kernels_tiles.py pads to."""

    name: str
    rows: int
    columns: int
    bits: int  # 0: dense
    block: int
    inputs: int


_chosen: dict[Key, Choice] = {}


def padded(batch: int) -> int:
    """The conversations that a tile takes: 16, 32 or 64."""
    return 16 if batch <= 16 else 32 if batch <= 32 else 64


def key_of(name: str, matrix: Matrix, batch: int) -> Key:
    """The key of an operation with one matrix."""
    inputs = batch if batch <= FEW else padded(batch)
    bits, block = (matrix.bits, matrix.block) if isinstance(matrix, Packed) else (0, 0)
    return Key(name, matrix.rows, matrix.columns, bits, block, inputs)


def choice_of(name: str, matrix: Matrix, batch: int) -> Choice:
    """What was found quickest, or else the first candidate."""
    first = candidates(name, matrix, batch)[0]
    found = _chosen.get(key_of(name, matrix, batch))
    # Never another kernel.
    return found if found is not None and type(found) is type(first) else first


def chosen() -> dict[Key, Choice]:
    """What `tune` found since the process began; `remember` takes it."""
    return dict(_chosen)


def remember(found: dict[Key, Choice]) -> None:
    """Take what an earlier process found, on the same card with the same versions."""
    _chosen.update(found)


def uses_pdl() -> bool:
    """Whether kernels start while the one before still runs: where that was found to pay for a product."""
    return any(getattr(choice, "pdl", False) for choice in _chosen.values())


def candidates(name: str, matrix: Matrix, batch: int) -> list[Choice]:
    """The ways to run an operation, the one to begin with first."""
    if batch <= FEW:
        return [*_rows_candidates(name, matrix)]
    if isinstance(matrix, Dense) and batch > MANY:
        return [Library()]
    return [*_tiles_candidates(name, matrix, batch)]


def of_each_kind(name: str, matrix: Matrix, batch: int) -> list[Choice]:
    """One way by each kernel that could run an operation, whatever the borders say."""
    ways: list[Choice] = [_rows_candidates(name, matrix)[0], _tiles_candidates(name, matrix, batch)[0]]
    return [*ways, Library()] if isinstance(matrix, Dense) else ways


def _rows_candidates(name: str, matrix: Matrix) -> list[Rows]:
    """8 rows first, of long rows 4; a gate's count twice.

    Many rows in a program share the input and keep loads in flight; few give a small matrix more programs,
    and each lane more registers. A warp for each 512 columns up to 4: more would wait for each other longer.
    """
    C = matrix.columns
    most = 16 if C <= 2048 else 8
    half = 2 if name == "norm_gate_up" else 1
    warps = 1 << min(2, max(0, C // 512 - 1).bit_length())
    return [Rows(rows // half, warps) for rows in (most // 2, most // 4, most)]


def _tiles_candidates(name: str, matrix: Matrix, batch: int) -> list[Tiles]:
    """Tiles of few rows where the matrix has few, so that each of 132 multiprocessors gets some."""
    outputs = matrix.rows // 2 if name == "norm_gate_up" else matrix.rows
    rows = 16 if outputs <= 4096 else 32 if outputs <= 16384 else 64
    first = Tiles(rows, 128 if batch <= 32 else 64)
    return [first, first._replace(stages=4), first._replace(rows=2 * rows)]


def tune(
    key: Key,
    ways: Sequence[Choice],
    run: Callable[[Choice], Tensor],
    time: Callable[[Choice], float],
    failures: tuple[type[BaseException], ...],
) -> dict[Choice, float]:
    """Seconds of each way that gives the first one's bits; the quickest becomes the choice for `key`.

    `run` gives an operation's result on fixed random inputs, `time` seconds. A way that raises one of
    `failures`, as a kernel does that does not fit the card, is passed over; the first that runs is the first.
    At last the quickest is tried with PDL.
    """
    if key in _chosen or isinstance(ways[0], Library):
        return {}
    due: Tensor | None = None
    seconds: dict[Choice, float] = {}

    def attempt(way: Choice) -> None:
        nonlocal due
        try:
            found = run(way)
            due = found if due is None else due
            if torch.equal(found, due):
                seconds[way] = time(way)
        except failures:
            return

    for way in ways:
        attempt(way)
    if seconds:
        quickest = min(seconds, key=lambda way: seconds[way])
        assert not isinstance(quickest, Library), f"{key.name}: cuBLAS beside kernels"
        attempt(quickest._replace(pdl=True))
        _chosen[key] = min(seconds, key=lambda way: seconds[way])
    return seconds
