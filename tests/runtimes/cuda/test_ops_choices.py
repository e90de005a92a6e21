"""What is run how, and that only ways with the same bits can be exchanged."""

import pytest
import torch

from runtimes.cuda import ops_choices
from runtimes.cuda.ops_choices import Library, Rows, Tiles
from runtimes.cuda.ops_matrix import Dense, Packed

DENSE = Dense(torch.zeros(4096, 64))
PACKED = Packed(torch.zeros(4096, 32, dtype=torch.uint8), torch.zeros(4096, 2), None, 4, 32)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(ops_choices, "_chosen", {})


def kinds(matrix, batches):
    return [type(ops_choices.choice_of("head", matrix, batch)) for batch in batches]


def test_the_kernel_follows_from_the_matrix_and_the_conversations():
    assert kinds(DENSE, (1, 2, 3, 8, 9, 64)) == [Rows, Rows, Tiles, Tiles, Library, Library]
    assert kinds(PACKED, (1, 2, 3, 8, 9, 64)) == [Rows, Rows, Tiles, Tiles, Tiles, Tiles]
    assert [ops_choices.padded(batch) for batch in (3, 16, 17, 32, 33, 64)] == [16, 16, 32, 32, 64, 64]


def test_warps_share_long_rows_and_rows_of_a_gate_count_twice():
    def first(name, columns):
        return ops_choices.candidates(name, Dense(torch.zeros(8, columns)), 1)[0]

    found = [first("linear_add", columns) for columns in (96, 256, 512, 1024, 2048, 4096)]
    assert [(way.rows, way.warps) for way in found] == [(8, 1), (8, 1), (8, 1), (8, 2), (8, 4), (4, 4)]
    assert first("norm_gate_up", 2048) == Rows(4, 4)


def test_ways_of_one_operation_are_of_one_kernel():
    for matrix in (DENSE, PACKED):
        for batch in (1, 2, 4, 16, 64):
            ways = ops_choices.candidates("norm_gate_up", matrix, batch)
            assert len({type(way) for way in ways}) == 1 and len(set(ways)) == len(ways)
    assert {type(way) for way in ops_choices.of_each_kind("head", DENSE, 4)} == {Rows, Tiles, Library}
    assert {type(way) for way in ops_choices.of_each_kind("head", PACKED, 4)} == {Rows, Tiles}


class Bench:
    """Results and seconds that are told in advance."""

    def __init__(self, results: dict, seconds: dict) -> None:
        self.results, self.seconds = results, seconds

    def run(self, way) -> torch.Tensor:
        if way not in self.results:
            raise RuntimeError("out of resources")
        return torch.tensor(self.results[way])

    def tune(self, key) -> dict:
        ways = ops_choices.candidates("head", DENSE, 1)
        return ops_choices.tune(key, ways, self.run, self.seconds.__getitem__, (RuntimeError,))


def test_the_quickest_of_those_with_the_first_one_s_bits_is_kept():
    first, second, third = ops_choices.candidates("head", DENSE, 1)
    key = ops_choices.key_of("head", DENSE, 1)
    results = {first: [1.0, 2.0], second: [1.0, 2.0], third: [1.0000001, 2.0]}  # in another order
    bench = Bench(results, {first: 3.0, second: 2.0, third: 1.0})
    assert bench.tune(key) == {first: 3.0, second: 2.0}
    assert ops_choices.choice_of("head", DENSE, 1) == second
    assert ops_choices.chosen() == {key: second} and not ops_choices.uses_pdl()
    assert bench.tune(key) == {}  # it is known
    assert ops_choices.choice_of("head", PACKED, 1) == ops_choices.candidates("head", PACKED, 1)[0]


def test_the_quickest_is_tried_with_an_early_start_too():
    first, second, third = ops_choices.candidates("head", DENSE, 1)
    early = second._replace(pdl=True)
    results = {way: [1.0] for way in (second, third, early)}  # the first does not fit the card
    Bench(results, {second: 2.0, third: 3.0, early: 1.5}).tune(ops_choices.key_of("head", DENSE, 1))
    assert ops_choices.choice_of("head", DENSE, 1) == early and ops_choices.uses_pdl()
    assert first.pdl is False


def test_cublas_has_nothing_to_choose_from():
    ways = ops_choices.candidates("head", DENSE, 64)
    assert ops_choices.tune(ops_choices.key_of("head", DENSE, 64), ways, None, None, ()) == {}


def test_where_nothing_runs_nothing_is_chosen():
    assert Bench({}, {}).tune(ops_choices.key_of("head", DENSE, 1)) == {}
    assert ops_choices.chosen() == {}


def test_a_remembered_choice_is_taken_but_never_another_kernel():
    ops_choices.remember({ops_choices.key_of("head", DENSE, 1): Rows(2, pdl=True)})
    assert ops_choices.choice_of("head", DENSE, 1) == Rows(2, pdl=True)
    assert ops_choices.uses_pdl()
    ops_choices.remember({ops_choices.key_of("head", DENSE, 16): Tiles(16, 64)})
    assert ops_choices.choice_of("head", DENSE, 16) == Library()


def test_a_failure_of_another_kind_is_not_hidden():
    with pytest.raises(KeyError):
        Bench({way: [0.0] for way in ops_choices.candidates("head", DENSE, 1)}, {}).tune(
            ops_choices.key_of("head", DENSE, 1)
        )
