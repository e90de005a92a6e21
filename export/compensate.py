"""Error-compensated rounding: each column's rounding error is made good by the columns not yet rounded.

GPTQ (Frantar et al., 2022): with H the Gram matrix of what a matrix reads, rounding column j of W by the
error e costs least when every later column k moves by -e * U[j, k] / U[j, j], U the upper Cholesky factor of
the inverse of H. Columns are rounded in falling order of H's diagonal, so that the ones that matter most have
the most others to make good for them; the grids of all blocks are searched for beforehand, so that the order
of rounding leaves the blocks where they are. With the integers fixed, the scales of a row's blocks are then
moved together to where the product with the input fits best, which is a small linear system. Rows are
independent of each other, which lets a matrix of any height go through in pieces. Knows arithmetic only; not
where activations come from, nor files.

Shapes: R rows, C columns, B blocks of K weights per row, N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from export.blockwise import Blocks, Grid, inverse_of, search, store
from fox_edge.quant import QuantType

# Added to the Gram matrix's diagonal, as a share of its mean: what calibration did not show is not free.
DAMPING = 0.01
# A column that calibration text hardly excites still matters this much, as a share of the mean.
FLOOR = 0.01
# Columns whose errors are gathered before the rest of the matrix is told.
PANEL = 128
# How strongly scales are held where the search put them, as a share of the system's mean diagonal.
_PULL = 1e-4
# Rows and columns of one tile of the Gram matrix; tiles below the diagonal are mirrored, not computed.
_TILE = 512


def gram(x: Tensor) -> Tensor:
    """x^T x (C, C) of activations (N, C), float32; computes the upper triangle's tiles only."""
    columns = x.shape[1]
    found = torch.empty(columns, columns)
    for start in range(0, columns, _TILE):
        stop = start + _TILE
        found[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
        found[stop:, start:stop] = found[start:stop, stop:].T
    return found


def importance(mean_squares: Tensor) -> Tensor:
    """What an error in each column costs (C,), mean 1, from the mean squares of what the columns read."""
    level = mean_squares.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (mean_squares / level).clamp(min=FLOOR)


class Compensation(NamedTuple):
    """What rounding needs to know of a matrix's input."""

    gram: Tensor  # (C, C), scaled to a mean diagonal of 1, damped
    importance: Tensor  # (C,)
    order: Tensor  # (C,) int64: columns, most important first
    factor: Tensor  # (C, C): upper Cholesky factor of the inverse Gram matrix, rows and columns in that order

    @classmethod
    def of(cls, gram: Tensor, damping: float = DAMPING) -> Compensation:
        """From the Gram matrix (C, C) of the input; more damping when it is too near to singular."""
        weight = importance(gram.diagonal())
        order = torch.argsort(weight, descending=True, stable=True)
        scaled = gram / gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        for extra in (damping, 9 * damping, 90 * damping):
            scaled.diagonal().add_(extra)
            # With rows and columns reversed, H = L L^T; then H^-1 = U^T U, U the inverse of L reversed.
            backwards = order.flip(0)
            lower, failed = torch.linalg.cholesky_ex(scaled[backwards][:, backwards])
            if not failed:
                return cls(scaled, weight, order, _inverse(lower).flip(0, 1))
        # Nothing but its own diagonal can be made of such an input: plain rounding on a weighted grid.
        return cls(torch.diag(weight), weight, order, torch.eye(len(weight)))


def _inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves: a third of the work of solving for identity."""
    size = len(lower)
    if size <= PANEL:
        return torch.linalg.solve_triangular(lower, torch.eye(size), upper=False)
    half = size // 2
    first, last = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    found = torch.zeros_like(lower)
    found[:half, :half], found[half:, half:] = first, last
    found[half:, :half] = -(last @ lower[half:, :half] @ first)
    return found


def quantize_compensated(rows: Tensor, type_: QuantType, guide: Compensation) -> Blocks:
    """Round float32 rows (R, C) to integers of a type so that their product with the input changes least."""
    height, columns = rows.shape
    type_.row_bytes("rows", columns)
    grid = search(rows.reshape(height, -1, type_.block_size), type_, guide.importance)
    integers = torch.empty(columns, height, dtype=torch.uint8)
    integers[guide.order] = _rounded(rows.T[guide.order], grid, type_, guide)
    blocks = integers.T.reshape(height, -1, type_.block_size)
    return store(blocks, _refitted(rows, blocks, grid, guide), type_)


def _rounded(waiting: Tensor, grid: Grid, type_: QuantType, guide: Compensation) -> Tensor:
    """Integers (C, R), uint8, of columns `waiting` (C, R) in the guide's order; uses `waiting` up."""
    scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()  # (B, R)
    inverses = inverse_of(scales)
    blocks = (guide.order // type_.block_size).tolist()
    columns, last = waiting.shape[0], 2**type_.bits - 1
    integers = torch.empty(waiting.shape, dtype=torch.uint8)
    for start in range(0, columns, PANEL):
        stop = min(start + PANEL, columns)
        panel, errors = waiting[start:stop], torch.empty(stop - start, waiting.shape[1])
        corner = guide.factor[start:stop, start:stop]
        for j, pivot in enumerate(corner.diagonal().tolist()):
            b = blocks[start + j]
            q = torch.addcmul(zeros[b], panel[j], inverses[b]).round_().clamp_(0, last)
            integers[start + j] = q
            error = torch.addcmul(panel[j], q.sub_(zeros[b]), scales[b], value=-1, out=errors[j])
            error /= pivot
            panel[j + 1 :].addr_(corner[j, j + 1 :], error, alpha=-1)
        waiting[stop:].addmm_(guide.factor[start:stop, stop:].T, errors, alpha=-1)
    return integers


def _refitted(rows: Tensor, integers: Tensor, grid: Grid, guide: Compensation) -> Grid:
    """The grid with scales (R, B) that bring rows (R, C) and integers (R, B, K) closest, seen from the input.

    For one row, with v_b its integers less their zeros where block b is and 0 elsewhere, the scales s that
    minimise (w - sum_b s_b v_b) H (w - sum_b s_b v_b)^T solve sum_b (v_a H v_b^T) s_b = w H v_a^T for all a.
    """
    height, count, size = integers.shape
    v = integers.float().sub_(grid.zeros[..., None])
    system = torch.empty(height, count, count)
    for b in range(count):
        seen = v[:, b] @ guide.gram[b * size : (b + 1) * size]
        system[:, b] = (seen.view_as(v) * v).sum(-1)
    wanted = ((rows @ guide.gram).view_as(v) * v).sum(-1)
    # A block of zeros has no say in the product: a slight pull towards where they were holds all scales.
    pull = system.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) * _PULL + torch.finfo(torch.float32).tiny
    system.diagonal(dim1=1, dim2=2).add_(pull)
    scales, _ = torch.linalg.solve_ex(system, wanted + pull * grid.scales)
    usable = torch.isfinite(scales).all(-1, keepdim=True)
    return Grid(torch.where(usable, scales, grid.scales).contiguous(), grid.zeros)
