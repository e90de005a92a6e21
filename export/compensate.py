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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fox_edge.quant import MOST_DRIFT
from fox_edge.walk import native_product

# Added to the Gram matrix's diagonal, as a share of its mean: what calibration did not show is not free.
DAMPING = 0.01
# A column that calibration text hardly excites still matters this much, as a share of the mean.
FLOOR = 0.01
# How far a matrix makes good what rounding has done to its input.
DRIFT = 0.5
# Columns whose errors are gathered before the rest of the matrix is told.
PANEL = 128
# How strongly scales are held where the search put them, as a share of the system's mean diagonal.
_PULL = 1e-4
# Rows whose factors are fitted at once.
_REFIT_ROWS = 256
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


@dataclass(frozen=True)
class Compensation:
    """What rounding needs to know of a matrix's input."""

    gram: Tensor  # (C, C), scaled to a mean diagonal of 1, damped
    importance: Tensor  # (C,)
    order: Tensor  # (C,) int64: columns, most important first
    factor: Tensor  # (C, C): upper Cholesky factor of the inverse Gram matrix, in that order
    drift: Tensor | None = None  # (C, C): rows times this is added to them before they are rounded

    @classmethod
    def of(cls, gram: Tensor, damping: float = DAMPING) -> Compensation:
        """From the Gram matrix (C, C) of the input, which it keeps and changes.

        More damping when it is too near to singular.
        """
        weight = importance(gram.diagonal())
        order = torch.argsort(weight, descending=True, stable=True)
        scaled = gram.div_(gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
        for extra in (damping, 9 * damping, 90 * damping):
            scaled.diagonal().add_(extra)
            factor = _factor(scaled, order)
            if factor is not None:
                return cls(scaled, weight, order, factor)
        # Nothing but its own diagonal can be made of such an input: plain rounding on a weighted grid.
        return cls(torch.diag(weight), weight, order, torch.diag(weight[order].rsqrt()))

    @classmethod
    def behind(cls, exact: Tensor, rounded: Tensor) -> Compensation:
        """For a matrix that reads `rounded` (N, C) instead of `exact` (N, C), behind matrices rounded before.

        Not the matrix itself is what to come closest to then, but the one whose product with the rounded
        input is closest to the original's with the exact input: with X and Y the two and D = (X - Y)^T Y,
        that is W + W D H^-1 (Li et al., 2025, GPTAQ). Only DRIFT of the way is gone, since calibration text
        shows only some of the inputs that will come.
        """
        found = gram(rounded)
        level = found.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        guide = cls.of(found)
        drift = native_product((exact - rounded).T, rounded.T).div_(level / DRIFT)
        drift = (drift[:, guide.order] @ guide.factor.T) @ guide.factor
        placed = torch.empty_like(drift)
        placed[:, guide.order] = drift
        usable = torch.isfinite(placed).all()
        return replace(guide, drift=placed) if usable else guide

    def target(self, rows: Tensor) -> Tensor:
        """What rows (R, C) should be rounded to, given what happened before them: at most MOST_DRIFT away."""
        if self.drift is None:
            return rows
        way = rows @ self.drift
        length = way.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        return rows + way * (MOST_DRIFT * rows.norm(dim=1) / length).clamp(max=1)[:, None]

    @cached_property
    def natural_factor(self) -> Tensor:
        """As `factor`, with rows and columns in the order of the matrix."""
        found = _factor(self.gram, torch.arange(len(self.gram)))
        return torch.diag(self.gram.diagonal().rsqrt()) if found is None else found


def _factor(gram: Tensor, order: Tensor) -> Tensor | None:
    """Upper Cholesky factor U, U^T U the inverse of a Gram matrix (C, C) in another order; None: singular."""
    # With rows and columns reversed, H = L L^T; then H^-1 = U^T U, U the inverse of L reversed.
    backwards = order.flip(0)
    lower, failed = torch.linalg.cholesky_ex(gram[backwards][:, backwards])
    return None if failed else _inverse(lower).flip(0, 1)


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


class Steps(NamedTuple):
    """The values that weights can take: level n is `scale * n + base`, or `scale * levels[n] + base`."""

    scales: Tensor  # (R, B)
    bases: Tensor  # (R, B)
    size: int  # numbers are from 0 to size - 1
    levels: Tensor | None = None  # (size,), ascending

    def values(self, numbers: Tensor) -> Tensor:
        """The values (R, C) of level numbers (R, C)."""
        blocks = numbers.view(*self.scales.shape, -1)
        levels = blocks.float() if self.levels is None else self.levels[blocks.long()]
        return (levels * self.scales[..., None] + self.bases[..., None]).flatten(1)


def choose(rows: Tensor, steps: Steps, guide: Compensation) -> Tensor:
    """Level numbers (R, C), uint8, for float32 rows (R, C), whose product with the input changes least."""
    height, columns = rows.shape
    width = columns // steps.scales.shape[1]
    numbers = torch.empty(columns, height, dtype=torch.uint8)
    numbers[guide.order] = _chosen(rows.T[guide.order], steps, (guide.order // width).tolist(), guide.factor)
    return numbers.T.contiguous()


def _chosen(waiting: Tensor, steps: Steps, blocks: list[int], factor: Tensor) -> Tensor:
    """Numbers (C, R), uint8, of columns `waiting` (C, R) in the guide's order; uses `waiting` up."""
    scales, bases = steps.scales.T.contiguous(), steps.bases.T.contiguous()  # (B, R)
    inverses = torch.where(scales == 0, 0.0, 1 / scales)
    zeros = -bases * inverses  # where the value 0 is, counted in levels
    bounds = None if steps.levels is None else (steps.levels[1:] + steps.levels[:-1]) / 2
    columns, last = waiting.shape[0], steps.size - 1
    numbers = torch.empty(waiting.shape, dtype=torch.uint8)
    for start in range(0, columns, PANEL):
        stop = min(start + PANEL, columns)
        panel, errors = waiting[start:stop], torch.empty(stop - start, waiting.shape[1])
        corner = factor[start:stop, start:stop]
        for j, pivot in enumerate(corner.diagonal().tolist()):
            b = blocks[start + j]
            q = torch.addcmul(zeros[b], panel[j], inverses[b])
            if bounds is None or steps.levels is None:
                q.round_().clamp_(0, last)
                numbers[start + j] = q
            else:
                found = torch.bucketize(q, bounds)
                numbers[start + j] = found
                q = steps.levels[found]
            error = torch.addcmul(panel[j], q, scales[b], value=-1, out=errors[j]).sub_(bases[b])
            error /= pivot
            panel[j + 1 :].addr_(corner[j, j + 1 :], error, alpha=-1)
        waiting[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return numbers


def choose_blocks(
    rows: Tensor, width: int, quantize: Callable[[Tensor, Tensor], Tensor], guide: Compensation
) -> None:
    """Round float32 rows (R, C) by blocks of `width` columns that can only be rounded as a whole.

    `quantize(columns, importance)` is given the columns (R, width) of each block in turn, moved by the errors
    of the blocks before, and what an error in each costs (width,); it returns what they have become. With K
    the columns that can still make good for a block J, an error e in J costs e (U_JJ^T U_JJ)^-1 e^T, U the
    Cholesky factor as above.
    """
    factor, waiting = guide.natural_factor, rows.clone()
    for start in range(0, rows.shape[1], width):
        stop = start + width
        corner = _inverse(factor[start:stop, start:stop].T.contiguous()).T  # its inverse, upper as well
        cost = corner.square().sum(1)
        block = waiting[:, start:stop].contiguous()
        errors = (block - quantize(block, cost / cost.mean())) @ corner
        waiting[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)


def refit(rows: Tensor, basis: list[Tensor], factors: list[Tensor], guide: Compensation) -> list[Tensor]:
    """Factors of vectors that bring their sum closest to rows (R, C), seen from the input.

    `basis`: each (R, S, W), S vectors that are 0 outside their own W columns; `factors`: each (R, S), where
    they are now. With v_i the vectors of one row, the factors f that minimise
    (w - sum_i f_i v_i) H (w - sum_i f_i v_i)^T solve sum_j (v_i H v_j^T) f_j = w H v_i^T for all i.
    """
    pieces = zip(
        rows.split(_REFIT_ROWS),
        zip(*(vectors.split(_REFIT_ROWS) for vectors in basis), strict=True),
        zip(*(factor.split(_REFIT_ROWS) for factor in factors), strict=True),
        strict=True,
    )
    found = [_refitted(part, vectors, before, guide.gram) for part, vectors, before in pieces]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _refitted(
    rows: Tensor, basis: Sequence[Tensor], factors: Sequence[Tensor], gram: Tensor
) -> Sequence[Tensor]:
    """The same for rows few enough that what is computed for one block of them stays in a core's cache."""
    count, width = basis[0].shape[1:]
    system = torch.empty(len(rows), len(basis), count, len(basis), count)
    for i, vectors in enumerate(basis):
        for s in range(count):
            # v_i H v_j^T is symmetric: blocks before this one have it already.
            seen = vectors[:, s] @ gram[s * width : (s + 1) * width, s * width :]
            seen = seen.view(-1, count - s, width)
            for j, others in enumerate(basis):
                part = (seen * others[:, s:]).sum(-1)
                system[:, i, s, j, s:] = part
                system[:, j, s:, i, s] = part
    seen = (rows @ gram).view(-1, count, width)
    wanted = torch.cat([(seen * vectors).sum(-1) for vectors in basis], 1)
    size, before = len(basis) * count, torch.cat(list(factors), 1)
    system = system.view(-1, size, size)
    # A block of zeros has no say in the product: a slight pull towards where they were holds all factors.
    diagonal = system.diagonal(dim1=1, dim2=2)
    pull = _PULL * diagonal + torch.finfo(torch.float32).tiny
    diagonal.add_(pull)
    found, _ = torch.linalg.solve_ex(system, wanted + pull * before)
    usable = torch.isfinite(found).all(-1, keepdim=True)
    return torch.where(usable, found, before).split(count, 1)
