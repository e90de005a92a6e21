"""The kernels against the plain operations: by Triton's interpreter, or on a card where there is one.

Inputs are fresh and random, odd in size; results lie in memory that was full of NaN before.
"""

import pytest
import torch
import torch.nn.functional as F

from runtimes.cuda import ops, ops_choices, ops_torch
from runtimes.cuda.ops_choices import Library, Rows, Tiles
from runtimes.cuda.ops_matrix import Dense, Matrix
from tests.runtimes.cuda.kernel_inputs import DEVICE, EPS, PACKED, dense, error, fresh, normal, packed

pytest.importorskip("triton")

from runtimes.cuda import ops_triton

__all__ = ["fresh"]  # the fixture


def check_products(matrix: Matrix, batch: int, choice, monkeypatch, bound: float = 1e-5) -> None:
    """The products with one matrix, by one way."""
    monkeypatch.setattr(ops_choices, "candidates", lambda *_: [choice])
    x, norm = normal(batch, matrix.columns), normal(matrix.columns)
    for name in ("norm_gate_up", "head" if isinstance(matrix, Dense) else "norm_linear"):
        found = getattr(ops_triton, name)(x, norm, EPS, matrix)
        due = getattr(ops_torch, name)(x, norm, EPS, matrix)
        assert found.shape == due.shape and found.dtype == due.dtype
        assert error(found, due) < bound, name
    residual = normal(batch, matrix.rows)
    due = residual.clone()
    ops_torch.linear_add(x, matrix, due)
    ops_triton.linear_add(x, matrix, residual)
    assert error(residual, due) < bound


@pytest.mark.parametrize(("rows", "columns", "batch"), [(10, 64, 1), (6, 96, 2), (18, 600, 1)])
def test_rows_of_numbers(rows, columns, batch, monkeypatch):
    monkeypatch.setattr(ops_triton, "_CHUNK", 256)
    check_products(dense(rows, columns), batch, Rows(4), monkeypatch)


@pytest.mark.parametrize("kind", PACKED, ids=str)
def test_rows_of_integers(kind, monkeypatch):
    """In three chunks, each of whole blocks. There 128 or 256 is added to integers: 5 bits of 24."""
    monkeypatch.setattr(ops_triton, "_CHUNK", 256)
    check_products(packed(6, 768, kind), 1, Rows(4), monkeypatch, bound=5e-5)


@pytest.mark.parametrize("kind", PACKED[::3], ids=str)
def test_a_chunk_longer_than_the_row_for_two_conversations(kind, monkeypatch):
    check_products(packed(6, 768, kind), 2, Rows(2), monkeypatch, bound=5e-5)


@pytest.mark.parametrize(("rows", "batch"), [(34, 3), (18, 17), (18, 64), (18, 65)])
def test_tiles_of_numbers(rows, batch, monkeypatch):
    check_products(dense(rows, 96), batch, Tiles(16, 64), monkeypatch)


@pytest.mark.parametrize("kind", PACKED, ids=str)
def test_tiles_of_integers(kind, monkeypatch):
    """In tiles shorter than the longest block."""
    check_products(packed(18, 256, kind), 5, Tiles(16, 128), monkeypatch)


@pytest.mark.parametrize("kind", PACKED[2:4], ids=str)
def test_the_last_tile_ends_behind_the_row(kind, monkeypatch):
    check_products(packed(18, 384, kind), 33, Tiles(16, 256), monkeypatch)


def test_the_library_s_product_between_our_kernels(monkeypatch):
    check_products(dense(34, 96), 9, Library(), monkeypatch)


@pytest.mark.parametrize("make", [dense, packed])
def test_a_row_s_bits_do_not_depend_on_the_rows_beside_it_nor_on_the_conversations(make, monkeypatch):
    """One warp sums a row in one order: what lets `tune` choose, and an answer stay what it was."""
    matrix, x, norm = make(6, 256), normal(2, 256), normal(256)
    results = []
    for rows in (1, 2, 8):
        monkeypatch.setattr(ops_choices, "candidates", lambda *_, rows=rows: [Rows(rows)])
        results.append(ops_triton.head(x, norm, EPS, matrix))
    results.append(torch.cat([ops_triton.head(x[i : i + 1], norm, EPS, matrix) for i in range(2)]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", [None, *PACKED], ids=str)
def test_embedding_and_dequantization(kind):
    matrix = dense(7, 100) if kind is None else packed(7, 768, kind)
    tokens = torch.tensor([6, 0, 3, 3], device=DEVICE)
    due = ops_torch.dequantize(matrix, torch.zeros(7, matrix.columns, device=DEVICE))
    assert error(ops_triton.embed(matrix, tokens, torch.float32), due[tokens]) < 1e-6
    poisoned = torch.full((7, matrix.columns), torch.nan, device=DEVICE)
    assert ops_triton.dequantize(matrix, poisoned) is poisoned
    assert error(poisoned, due) < 1e-6


@pytest.mark.parametrize("make", [dense, packed])
def test_bfloat16_in_and_out(make, monkeypatch):
    """The types of a session: sums stay float32, one rounding at the end."""
    matrix = make(10, 256)
    if isinstance(matrix, Dense):
        matrix = Dense(matrix.weight.bfloat16())
    x, norm = normal(1, 256, dtype=torch.bfloat16), normal(256, dtype=torch.bfloat16)
    found = ops_triton.norm_linear(x, norm, EPS, matrix)
    assert found.dtype == torch.bfloat16
    weight = matrix.weight if isinstance(matrix, Dense) else ops_torch.values(matrix)
    h = x.double()
    h = h * torch.rsqrt(h.square().mean() + EPS) * norm.double()
    due = F.linear(h, weight.double())
    assert error(found, due) < 5e-3  # up to 1/256 of each result is cut off, here by truncation
    assert error(ops_triton.head(x, norm, EPS, matrix), due) < 5e-5


def test_tensors_on_the_cpu_come_here_when_asked(monkeypatch):
    monkeypatch.setattr(ops, "kernels_on_cpu", True)
    called = []
    monkeypatch.setattr(ops_triton, "embed", lambda *arguments: called.append(arguments))
    ops.embed(dense(2, 16), torch.tensor([1], device=DEVICE), torch.float32)
    assert len(called) == 1


def test_every_type_of_matrix_finds_its_own_way(monkeypatch):
    """Timing needs a card; here each way is run once, and the later the quicker."""
    monkeypatch.setattr(ops_choices, "_chosen", {})
    timed = []

    def seconds(run, matrices):
        run(matrices[-1])
        timed.append(len(matrices))
        return 1 / len(timed)

    monkeypatch.setattr(ops_triton, "_seconds", seconds)
    matrices = [dense(6, 64), packed(6, 64), dense(6, 64)]
    ops_triton.tune("linear_add", matrices, 1, torch.float32)
    assert set(timed) == {1, 2}
    chosen = ops_choices.chosen()
    assert {key.bits for key in chosen} == {0, 4}
    last = ops_choices.candidates("linear_add", matrices[0], 1)[-1]
    assert {way._replace(pdl=False) for way in chosen.values()} == {last}
    known = len(timed)
    ops_triton.tune("linear_add", matrices, 1, torch.float32)
    assert len(timed) == known
    kinds = {type(way) for way in ops_triton.times("head", matrices[:1], 1, torch.float32)}
    assert kinds == {Rows, Tiles, Library}
