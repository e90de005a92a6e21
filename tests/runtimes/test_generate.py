"""Sampling against distributions computed by hand, and the generation loop on a scripted session."""

import math

import numpy as np
import pytest

from fox_edge.errors import ContextOverflowError, FoxEdgeError
from runtimes.base import Session
from runtimes.generate import Sampling, generate, pick


class ScriptedSession:
    """Says a fixed sequence of tokens, whatever it is asked; records what it was given."""

    def __init__(self, script: list[int], context: int = 32, vocab_size: int = 16) -> None:
        self.script, self.context, self.vocab_size = script, context, vocab_size
        self.seen: list[int] = []
        self.said = 0

    @property
    def length(self) -> int:
        return len(self.seen)

    def prefill(self, tokens):
        assert len(self.seen) + len(tokens) <= self.context
        self.seen += tokens
        logits = np.zeros(self.vocab_size, np.float32)
        logits[self.script[self.said]] = 50.0
        self.said += 1
        return logits

    def step(self, token):
        return self.prefill([token])

    def score(self, tokens, start=0):
        raise NotImplementedError

    def truncate(self, length):
        del self.seen[length:]

    def reset(self):
        self.seen.clear()

    def close(self):
        self.seen.clear()


def frequencies(logits, sampling: Sampling, draws: int = 4000) -> np.ndarray:
    rng = sampling.rng()
    logits = np.asarray(logits, np.float32)
    drawn = [pick(logits, sampling, rng) for _ in range(draws)]
    return np.bincount(drawn, minlength=logits.size) / draws


# Probabilities 0.5, 0.3, 0.15, 0.05, in shuffled places.
PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3])
LOGITS = np.log(PROBABILITIES) + 7.0


def test_greedy_takes_the_first_of_the_best():
    rng = np.random.default_rng(0)
    assert pick(np.array([1, 3, 2, 3], np.float32), Sampling(), rng) == 1


def test_temperature_one_draws_the_model_s_own_distribution():
    assert np.allclose(frequencies(LOGITS, Sampling(1.0, seed=1)), PROBABILITIES, atol=0.03)


def test_temperature_flattens_and_sharpens():
    halved = PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()
    assert np.allclose(frequencies(LOGITS, Sampling(2.0, seed=1)), halved, atol=0.03)
    assert frequencies(LOGITS, Sampling(0.05, seed=1))[1] > 0.99


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.49, [1]), (0.5, [1]), (0.51, [1, 3]), (0.8, [1, 3]), (0.81, [0, 1, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(top_p, kept):
    expected = np.zeros(4)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    # One part in a thousand of slack in the logits' float32 sums, none in which tokens are kept.
    found = frequencies(LOGITS, Sampling(1.0, top_p=top_p - 1e-4 if top_p in (0.5, 0.8) else top_p, seed=2))
    assert set(np.flatnonzero(found)) == set(kept)
    assert np.allclose(found, expected, atol=0.03)


@pytest.mark.parametrize(("min_p", "kept"), [(0.05, 4), (0.11, 3), (0.31, 2), (0.7, 1), (1.0, 1)])
def test_min_p_keeps_tokens_of_a_share_of_the_best(min_p, kept):
    assert np.count_nonzero(frequencies(LOGITS, Sampling(1.0, min_p=min_p, seed=3))) == kept


def test_top_p_of_a_large_flat_vocabulary_needs_more_than_the_first_candidates():
    logits = np.zeros(20_000, np.float32)
    found = frequencies(logits, Sampling(1.0, top_p=0.5, seed=4), draws=600)
    kept = np.flatnonzero(found)
    # Equal tokens: ids in order, so exactly the first half may be drawn, and far more than 256 of them are.
    assert kept.max() <= 10_000
    assert kept.max() > 9_000


def test_same_seed_same_draws_and_another_seed_others():
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)

    def draw(seed: int) -> list[int]:
        sampling = Sampling(1.0, top_p=0.95, min_p=0.01, seed=seed)
        rng = sampling.rng()
        return [pick(logits, sampling, rng) for _ in range(20)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_named(bad):
    with pytest.raises(FoxEdgeError, match="token 2"):
        pick(np.array([1, 2, bad, 0], np.float32), Sampling(), np.random.default_rng(0))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"seed": -1},
    ],
)
def test_impossible_sampling_is_refused(fields):
    with pytest.raises(FoxEdgeError, match=next(iter(fields))):
        Sampling(**fields)


def test_scripted_session_is_a_session():
    assert isinstance(ScriptedSession([]), Session)


def test_stop_token_ends_and_is_not_yielded():
    session = ScriptedSession([4, 5, 1, 6])
    generation = generate(session, [2, 3], stop_ids={1})
    assert list(generation) == [4, 5]
    assert generation.finish_reason == "stop"
    assert session.seen == [2, 3, 4, 5]


def test_max_tokens_ends_without_a_step_nobody_reads():
    session = ScriptedSession([4, 5, 6, 7])
    generation = generate(session, [2], max_tokens=2)
    assert list(generation) == [4, 5]
    assert generation.finish_reason == "length"
    assert session.seen == [2, 4]


def test_no_tokens_wanted_runs_nothing():
    session = ScriptedSession([4])
    generation = generate(session, [2], max_tokens=0)
    assert list(generation) == []
    assert (generation.finish_reason, session.seen) == ("length", [])


def test_a_full_context_ends_and_says_so():
    session = ScriptedSession([4, 5, 6, 7], context=4)
    generation = generate(session, [2, 3])
    assert list(generation) == [4, 5, 6]
    assert generation.finish_reason == "context"
    assert session.length == 4


def test_a_prompt_that_fills_the_context_gives_one_token():
    session = ScriptedSession([4], context=2)
    generation = generate(session, [2, 3])
    assert list(generation) == [4]
    assert generation.finish_reason == "context"


def test_a_prompt_too_long_is_refused_at_once_with_the_cache_untouched():
    session = ScriptedSession([4], context=4)
    session.prefill([9, 9])
    with pytest.raises(ContextOverflowError, match="5 tokens does not fit a context of 4"):
        generate(session, [2, 3, 4])
    assert session.seen == [9, 9]


def test_an_empty_prompt_is_refused():
    with pytest.raises(FoxEdgeError, match="at least one token"):
        generate(ScriptedSession([]), [])


def test_reason_is_unknown_while_tokens_may_come():
    generation = generate(ScriptedSession([4, 1]), [2], stop_ids=[1])
    assert next(generation) == 4
    assert generation.finish_reason is None
