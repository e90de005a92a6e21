"""The attention kernel against the plain operation: by Triton's interpreter, or on a card if there is one."""

import pytest
import torch

from runtimes.cuda import ops_torch
from tests.runtimes.cuda.kernel_inputs import DEVICE, error, fresh, normal

pytest.importorskip("triton")

from runtimes.cuda import ops_triton

__all__ = ["fresh"]  # the fixture


def places(slots, positions):
    return [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (slots, positions)]


def check(heads, kv_heads, head_dim, context, slots, positions) -> None:
    """The output and the writes to the cache; what lies behind a conversation's end is NaN."""
    qkv = normal(len(slots), (heads + 2 * kv_heads) * head_dim)
    angles = normal(context, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    keys, values = (normal(max(slots) + 1, kv_heads, context, head_dim) for _ in range(2))
    for slot, position in zip(slots, positions, strict=True):
        keys[slot, :, position:] = torch.nan
        values[slot, :, position:] = torch.nan
    due_keys, due_values = keys.clone(), values.clone()
    due = ops_torch.attend(qkv, due_keys, due_values, *places(slots, positions), cos, sin)
    found = ops_triton.attend(qkv, keys, values, *places(slots, positions), cos, sin)
    assert found.shape == due.shape and found.dtype == due.dtype
    assert error(found, due) < 1e-5
    for cache, expected in ((keys, due_keys), (values, due_values)):
        assert torch.equal(cache.isnan(), expected.isnan())
        assert error(cache.nan_to_num(), expected.nan_to_num()) < 1e-6


@pytest.mark.parametrize(
    ("shape", "positions"),
    [
        ((16, 4, 128), (0, 65, 199)),  # Fox-1's heads
        ((4, 1, 64), (1, 63, 127)),  # nano's
        ((4, 1, 64), (64, 128, 5)),
        ((6, 2, 24), (63, 64, 199)),
    ],
)
def test_at_the_edges_of_splits(shape, positions):
    check(*shape, context=200, slots=(2, 0, 3), positions=positions)


def test_a_context_of_one_split(monkeypatch):
    monkeypatch.setattr(ops_triton, "_counters_of", None)
    check(4, 2, 16, context=64, slots=(1, 0), positions=(63, 0))


def test_splits_of_several_tiles(monkeypatch):
    monkeypatch.setattr(ops_triton, "split_length", lambda batch: 128)
    check(4, 2, 16, context=400, slots=(1, 0, 2), positions=(399, 128, 300))


def test_more_splits_than_are_weighed_at_a_time(monkeypatch):
    monkeypatch.setattr(ops_triton, "_TOGETHER", 2)
    check(4, 2, 16, context=400, slots=(1, 0), positions=(399, 200))


def test_a_conversation_goes_on_over_the_edge_of_a_split():
    """The counter is back at zero after each step, and what a step wrote is read by the next."""
    H, K, D, S = 4, 2, 16, 130
    keys, values = (torch.full((2, K, S, D), torch.nan, device=DEVICE) for _ in range(2))
    keys[1, :, :62], values[1, :, :62] = normal(K, 62, D), normal(K, 62, D)
    due_keys, due_values = keys.clone(), values.clone()
    angles = normal(S, D // 2)
    for position in range(62, 67):
        qkv = normal(1, (H + 2 * K) * D)
        where = places([1], [position])
        found = ops_triton.attend(qkv, keys, values, *where, angles.cos(), angles.sin())
        due = ops_torch.attend(qkv, due_keys, due_values, *where, angles.cos(), angles.sin())
        assert error(found, due) < 1e-5
    assert not ops_triton._counters_of(keys, 1).any()


def test_a_scratch_slot_that_several_share_does_not_disturb_the_others():
    """A batch is filled up with rows of slot 3 at position 0, whose output nobody reads."""
    qkv = normal(5, 8 * 16)
    cos, sin = torch.ones(70, 8, device=DEVICE), torch.zeros(70, 8, device=DEVICE)
    keys, values = (normal(4, 2, 70, 16) for _ in range(2))
    slots, positions = places([1, 3, 0, 3, 3], [69, 0, 7, 0, 0])
    real = [0, 2]
    due_keys, due_values = keys.clone(), values.clone()
    due = ops_torch.attend(qkv[real], due_keys, due_values, slots[real], positions[real], cos, sin)
    found = ops_triton.attend(qkv, keys, values, slots, positions, cos, sin)
    assert error(found[real], due) < 1e-5
    assert torch.equal(keys[:3], due_keys[:3]) and torch.equal(values[:3], due_values[:3])


def test_fewer_conversations_are_split_more():
    assert [ops_triton.split_length(batch) for batch in (1, 4, 8, 16, 32, 64)] == [64, 64, 128, 128, 256, 256]
