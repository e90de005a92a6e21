"""The torch session against the bare reference model, called once on everything."""

import dataclasses

import numpy as np
import pytest
import torch

from fox_edge.config import FoxConfig
from fox_edge.errors import ContextOverflowError, FoxEdgeError
from fox_edge.model import Fox
from runtimes.base import SCORE_CHUNK, Session, SessionOptions
from runtimes.generate import generate
from runtimes.torch import PREFILL_CHUNK, TorchSession

CONFIG = FoxConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=800,
)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class RandomSource:
    """What TorchSession needs of a checkpoint: a shape and a model with fixed random weights."""

    def __init__(self, config: FoxConfig = CONFIG) -> None:
        self.config = config
        self.loads = 0

    def load_model(self, dtype=torch.float32, device="cpu") -> Fox:
        self.loads += 1
        torch.manual_seed(0)
        return Fox(self.config).to(dtype=dtype, device=device)


def tokens(count: int) -> list[int]:
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, count).tolist()


def whole(ids: list[int], dtype=torch.float32) -> np.ndarray:
    """Logits of all positions by one plain call of the model, no cache."""
    with torch.inference_mode():
        return RandomSource().load_model(dtype)(torch.tensor([ids]))[0].float().numpy()


@pytest.fixture(params=DEVICES)
def session(request):
    opened = TorchSession(RandomSource(), SessionOptions(), torch.float32, request.param)
    yield opened
    opened.close()


def test_it_is_a_session_of_the_model_s_whole_context(session):
    assert isinstance(session, Session)
    assert (session.context, session.vocab_size, session.length) == (800, 300, 0)


def test_prefill_in_chunks_gives_the_last_row_of_the_whole(session):
    ids = tokens(PREFILL_CHUNK + 77)
    logits = session.prefill(ids)
    assert (logits.shape, logits.dtype) == ((300,), np.float32)
    assert np.abs(logits - whole(ids)[-1]).max() < 1e-4
    assert session.length == len(ids)


def test_prefill_steps_and_truncation_agree_with_the_whole(session):
    ids = tokens(40)
    expected = whole(ids)
    session.prefill(ids[:10])
    for n in range(10, 20):
        assert np.abs(session.step(ids[n]) - expected[n]).max() < 1e-4
    session.prefill([7, 8, 9])
    session.truncate(20)
    assert session.length == 20
    assert np.abs(session.prefill(ids[20:]) - expected[-1]).max() < 1e-4
    session.reset()
    assert np.abs(session.prefill(ids) - expected[-1]).max() < 1e-4


def test_score_gives_every_row_in_bounded_chunks(session):
    ids = tokens(3 * SCORE_CHUNK + 5)
    chunks = list(session.score(ids))
    assert max(len(c) for c in chunks) <= SCORE_CHUNK
    assert np.abs(np.concatenate(chunks) - whole(ids)).max() < 1e-4


@pytest.mark.parametrize("start", [1, SCORE_CHUNK, SCORE_CHUNK + 9, 146])
def test_score_from_a_start_gives_the_rows_after_it(session, start):
    ids = tokens(150)
    session.prefill(ids[:3])
    rows = np.concatenate(list(session.score(ids[3:], start)))
    assert rows.shape == (147 - start, 300)
    assert np.abs(rows - whole(ids)[3 + start :]).max() < 1e-4


def test_bfloat16_is_close_to_float32_but_not_equal():
    ids = tokens(30)
    session = TorchSession(RandomSource(), SessionOptions(), torch.bfloat16)
    logits = session.prefill(ids)
    assert logits.dtype == np.float32
    difference = np.abs(logits - whole(ids)[-1]).max()
    assert 0 < difference < 0.05 * np.abs(whole(ids)).max()


def test_too_many_tokens_are_refused_with_the_cache_untouched():
    session = TorchSession(RandomSource(), SessionOptions(context=16), torch.float32)
    session.prefill(tokens(10))
    with pytest.raises(ContextOverflowError, match="10 tokens and 7 more do not fit a context of 16"):
        session.prefill(tokens(7))
    with pytest.raises(ContextOverflowError):
        next(session.score(tokens(7)))
    assert session.length == 10
    session.prefill(tokens(6))
    assert session.length == 16


def test_a_context_beyond_the_model_is_refused_before_weights_are_read():
    source = RandomSource()
    with pytest.raises(ContextOverflowError, match="801"):
        TorchSession(source, SessionOptions(context=801), torch.float32)
    assert source.loads == 0


@pytest.mark.parametrize(("ids", "message"), [([], "at least one"), ([3, 300], "3 to 300"), ([-1], "-1")])
def test_foreign_tokens_are_refused(session, ids, message):
    with pytest.raises(FoxEdgeError, match=message):
        session.prefill(ids)


def test_a_closed_session_says_so(session):
    session.close()
    with pytest.raises(FoxEdgeError, match="closed"):
        session.prefill([1])


def test_an_unknown_device_is_named():
    with pytest.raises(FoxEdgeError, match="'gpu3'"):
        TorchSession(RandomSource(), device="gpu3")


def test_greedy_text_equals_the_model_s_own_argmax_chain():
    ids = tokens(5)
    chain = list(ids)
    for _ in range(12):
        chain.append(int(whole(chain)[-1].argmax()))
    session = TorchSession(RandomSource(dataclasses.replace(CONFIG)), SessionOptions(), torch.float32)
    assert list(generate(session, ids, max_tokens=12)) == chain[5:]
