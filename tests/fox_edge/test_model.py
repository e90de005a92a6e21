"""The reference model against Hugging Face's, on random small shapes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fox_edge.config import FoxConfig
from fox_edge.errors import ContextOverflowError
from fox_edge.model import Fox, KVCache

TOLERANCE = 1e-4
LENGTH = 23


def make(heads: int, kv_heads: int, tied: bool, seed: int = 0) -> tuple[Fox, LlamaForCausalLM, torch.Tensor]:
    config = FoxConfig(
        vocab_size=301,
        hidden_size=48,
        intermediate_size=80,
        num_layers=3,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=8,
        max_positions=64,
        tied=tied,
    )
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(LlamaConfig(**config.to_hf(), initializer_range=0.3)).float().eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    ours = Fox(config).eval()
    ours.load_state_dict({name: t for name, t in theirs.state_dict().items() if name in ours.state_dict()})
    tokens = torch.randint(0, config.vocab_size, (2, LENGTH))
    return ours, theirs, tokens


@pytest.fixture(params=[(4, 4), (8, 2), (16, 1)], ids=["1:1", "4:1", "16:1"])
def heads(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_equals_hugging_face(heads: tuple[int, int], tied: bool) -> None:
    ours, theirs, tokens = make(*heads, tied)
    expected = theirs(tokens).logits
    assert expected.std() > 0.5, "logits that are all alike would prove nothing"
    assert (ours(tokens) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [5, 1, 7, 10], [10, 1, 1, 11]])
@torch.no_grad()
def test_cache_equals_hugging_face(heads: tuple[int, int], tied: bool, chunks: list[int]) -> None:
    ours, theirs, tokens = make(*heads, tied)
    expected = theirs(tokens).logits
    cache = KVCache(ours.config, batch=2, positions=LENGTH)
    parts = [ours(part, cache) for part in tokens.split(chunks, dim=1)]
    assert (torch.cat(parts, dim=1) - expected).abs().max() <= TOLERANCE
    assert cache.length == LENGTH


@torch.no_grad()
def test_truncated_cache_forgets() -> None:
    ours, theirs, tokens = make(4, 1, True)
    cache = KVCache(ours.config, batch=2)
    ours(tokens, cache)
    cache.truncate(9)
    again = ours(tokens[:, 9:], cache)
    assert (again - theirs(tokens).logits[:, 9:]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_last_only() -> None:
    ours, _, tokens = make(4, 2, True)
    last = ours(tokens, last_only=True)
    assert last.shape == (2, 1, 301)
    assert (last - ours(tokens)[:, -1:]).abs().max() <= 1e-5


def test_tied_means_one_tensor() -> None:
    ours, _, _ = make(4, 1, True)
    assert not hasattr(ours, "lm_head")
    assert ours.head_weight is ours.model.embed_tokens.weight
    assert sum(p.numel() for p in ours.parameters()) == ours.config.num_parameters()


@torch.no_grad()
def test_context_overflow() -> None:
    ours, _, tokens = make(4, 1, True)
    cache = KVCache(ours.config, batch=2, positions=30)
    ours(tokens, cache)
    with pytest.raises(ContextOverflowError, match="23 positions and 23 more do not fit a context of 30"):
        ours(tokens, cache)
    assert cache.length == LENGTH
    with pytest.raises(ContextOverflowError, match="65 more do not fit a context of 64"):
        ours(torch.zeros((1, 65), dtype=torch.long))
    with pytest.raises(ContextOverflowError, match="65 positions"):
        KVCache(ours.config, positions=65)
