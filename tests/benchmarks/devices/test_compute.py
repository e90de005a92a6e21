"""The ceiling of prompts: operations counted by hand and by PyTorch, rates in proportion to each other."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.devices.compute import (
    BF16,
    FLOAT32,
    INT8,
    Compute,
    best_of,
    ceiling_for,
    measure_compute,
    operations_per_token,
    prompt_figures,
    prompt_operations,
)
from fox_edge.config import FoxConfig


def compute(kind: str, rate: float) -> Compute:
    return Compute(kind, rate, "made up", 1, {"made up": rate})


def test_the_operations_of_a_prompt_by_hand() -> None:
    config = FoxConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=16,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_positions=64,
    )
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k and v, o, the three of the MLP
    attention = 2 * 8 * (1 + 2 + 3 + 4 + 5)  # two products of 2 heads x 4 numbers with what each token sees
    assert prompt_operations(config, 5) == 2 * (3 * (5 * layer + attention) + 100 * 8)
    # With 10 in the cache each token sees 10 more; weights and head are as before.
    assert prompt_operations(config, 5, 10) - prompt_operations(config, 5) == 2 * 3 * 2 * 8 * 5 * 10


def test_pytorch_counts_the_same_for_what_is_not_attention() -> None:
    """An independent counter over the products of one layer and the head."""
    config = FoxConfig.nano()
    h, q, i, tokens = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size, 7
    shapes = [(h, q), (h, config.kv_dim), (h, config.kv_dim), (q, h), (h, i), (h, i), (i, h)]
    with FlopCounterMode(display=False) as counter:
        for rows, columns in shapes:
            torch.randn(tokens, rows) @ torch.randn(rows, columns)
    layers = config.num_layers * counter.get_total_flops()
    head = 2 * config.vocab_size * h
    attention = config.num_layers * 4 * q * (7 * 8 // 2)
    assert prompt_operations(config, tokens) == layers + head + attention


def test_fox_1_s_prompt_in_operations_is_twice_its_body_and_a_bit() -> None:
    config = FoxConfig.fox_1()
    body = config.num_parameters() - config.vocab_size * config.hidden_size
    per_token = prompt_operations(config, 234) / 234
    assert 2 * body < per_token < 2.05 * body


def test_turns_see_what_was_said_before() -> None:
    config = FoxConfig.nano()
    single = operations_per_token(config, [[30], [50]], 8)
    assert single == (prompt_operations(config, 30) + prompt_operations(config, 50)) / 80
    # The second turn reads its 20 and the last token of the answer, after 30 and 8 in the cache.
    turns = operations_per_token(config, [[30, 20]], 8)
    assert turns == (prompt_operations(config, 30) + prompt_operations(config, 21, 38)) / 51


def test_a_row_s_share_is_of_the_fastest_arithmetic_that_its_weights_allow() -> None:
    rates = [compute(FLOAT32, 1e11), compute(BF16, 4e11), compute(INT8, 8e11)]
    expected = {"float32": FLOAT32, "f32": FLOAT32, "bf16": BF16, "f16": INT8, "int4": INT8, "q8s32": INT8}
    for quant, kind in expected.items():
        found = ceiling_for(quant, rates)
        assert found is not None and found.type == kind
    # No instructions for bf16: products in float32 are faster then, and a bf16 model may be run so.
    slow = [compute(FLOAT32, 1e11), compute(BF16, 2e10)]
    assert ceiling_for("bf16", slow) == slow[0] and ceiling_for("int4", slow) == slow[0]
    assert ceiling_for("int4", []) is None


def test_the_figures_of_a_row() -> None:
    row = {"quant": "int4", "prompt_tokens_per_s": 50.0}
    assert prompt_figures(row, 2e9, [compute(INT8, 4e11)]) == {
        "prompt_operations_per_token": 2e9,
        "prompt_ceiling_tokens_per_s": 200,
        "prompt_roofline_percent": 25,
    }
    unknown = prompt_figures(row, None, [compute(INT8, 4e11)])
    assert set(unknown.values()) == {None}
    assert prompt_figures({"quant": "int4"}, 2e9, [compute(INT8, 4e11)])["prompt_roofline_percent"] is None


def test_of_two_measurements_the_better_of_each_type() -> None:
    one, two = [compute(FLOAT32, 1), compute(INT8, 5)], [compute(FLOAT32, 2), compute(INT8, 4)]
    assert [(c.type, c.operations_per_s) for c in best_of(one, two)] == [(FLOAT32, 2), (INT8, 5)]


@pytest.fixture(scope="module")
def measured() -> dict[str, Compute]:
    return {c.type: c for c in measure_compute(threads=1, seconds=0.5)}


def test_a_rate_is_the_best_of_several_ways(measured: dict[str, Compute]) -> None:
    assert list(measured) == [FLOAT32, BF16, INT8]
    for found in measured.values():
        assert found.operations_per_s == max(found.methods.values()) == found.methods[found.method]
        # One thread of any processor that can run this; more would be an error in counting.
        assert 1e8 < found.operations_per_s < 5e12
    assert len(measured[FLOAT32].methods) >= 2 and len(measured[INT8].methods) >= 3


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    measure_compute(threads=1, seconds=0.1)
    assert torch.get_num_threads() == before
