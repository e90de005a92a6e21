"""Sampling against distributions computed by hand, and the generation loop on a scripted session."""

import math

import numpy as np
import pytest

from fox_edge.errors import ContextOverflowError, FoxEdgeError
from runtimes.base import BatchingSession, Session
from runtimes.generate import Picker, generate, logprobs_of
from runtimes.sampling import Choice, Sampling, choose, penalize, pick


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
    drawn = [pick(logits, sampling, rng.random()) for _ in range(draws)]
    return np.bincount(drawn, minlength=logits.size) / draws


# Probabilities 0.5, 0.3, 0.15, 0.05, in shuffled places.
PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3])
LOGITS = np.log(PROBABILITIES) + 7.0


def test_greedy_takes_the_first_of_the_best():
    assert pick(np.array([1, 3, 2, 3], np.float32), Sampling(), 0.9) == 1


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
        return [pick(logits, sampling, rng.random()) for _ in range(20)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_named(bad):
    with pytest.raises(FoxEdgeError, match="token 2"):
        pick(np.array([1, 2, bad, 0], np.float32), Sampling(), 0.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"seed": -1},
        {"top_k": -1},
        {"repeat_penalty": 0},
        {"repeat_penalty": math.inf},
        {"repeat_window": -1},
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


@pytest.mark.parametrize(("top_k", "kept"), [(0, 4), (1, 1), (2, 2), (3, 3), (4, 4), (99, 4)])
def test_top_k_keeps_the_likeliest(top_k, kept):
    found = frequencies(LOGITS, Sampling(1.0, top_k=top_k, seed=3))
    assert set(np.flatnonzero(found)) == set(np.argsort(-PROBABILITIES)[:kept])


def test_top_p_is_of_the_mass_that_top_k_leaves():
    # Of 0.5 and 0.3, the first alone holds 0.625.
    assert np.count_nonzero(frequencies(LOGITS, Sampling(1.0, top_k=2, top_p=0.62, seed=3))) == 1
    assert np.count_nonzero(frequencies(LOGITS, Sampling(1.0, top_p=0.62, seed=3))) == 2


def test_equals_at_the_edge_of_top_k_are_taken_by_id():
    logits = np.array([0, 1, 1, 1, 2], np.float32)
    assert set(np.flatnonzero(frequencies(logits, Sampling(1.0, top_k=3, seed=1)))) == {1, 2, 4}


def test_repeat_penalty_divides_what_is_positive_and_multiplies_what_is_not():
    logits = np.array([4.0, 3.0, -1.0, -0.5, 0.0], np.float32)
    penalize(logits, [0, 2, 0, 4], 2.0)
    assert logits.tolist() == [2.0, 3.0, -2.0, -0.5, 0.0]


@pytest.mark.parametrize(("window", "picked"), [(64, [3, 2, 1, 0]), (1, [3, 2, 3, 2]), (0, [3, 3, 3, 3])])
def test_repeat_penalty_looks_back_over_its_window(window, picked):
    sampling = Sampling(repeat_penalty=2.0, repeat_window=window)
    picker = Picker(sampling)
    logits = np.array([5.0, 6.0, 7.0, 8.0], np.float32)
    assert [picker.pick(logits) for _ in range(4)] == picked
    assert logits.tolist() == [5.0, 6.0, 7.0, 8.0]


def test_repeat_penalty_counts_the_prompt_and_what_came_before_it():
    class Warm(ScriptedSession):
        def prefill(self, tokens):
            return super().prefill(tokens) + 1  # a penalized token falls below the others

    session = Warm([4, 4, 4, 4])

    def first(prompt: list[int], history: list[int]) -> int:
        session.reset()
        sampling = Sampling(repeat_penalty=1e9, repeat_window=3)
        return next(generate(session, prompt, sampling, history=history))

    assert first([1, 2, 3], []) == 4
    assert first([4, 2, 3], []) != 4
    assert first([2, 3], [9, 4]) != 4
    assert first([2, 3], [4, 9]) == 4


class Forbid:
    """A constraint that forbids what was picked before; records what it was told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def apply(self, logits):
        logits[self.told] = -np.inf

    def accept(self, token):
        self.told.append(token)


def test_a_constraint_masks_logits_and_is_told_every_token_the_stop_too():
    session = ScriptedSession([4, 4, 4])
    constraint = Forbid()
    generation = generate(session, [2], stop_ids={1}, constraint=constraint, logprobs=0)
    assert list(generation) == [4, 0]
    assert (generation.finish_reason, constraint.told) == ("stop", [4, 0, 1])
    assert [entry.token for entry in generation.logprobs] == [4, 0]


def test_a_constraint_that_leaves_nothing_is_an_error():
    class Nothing(Forbid):
        def apply(self, logits):
            logits[:] = -np.inf

    with pytest.raises(FoxEdgeError, match="not numbers"):
        next(generate(ScriptedSession([4]), [2], constraint=Nothing()))


def test_logprobs_are_the_model_s_own_whatever_was_done_to_pick():
    found = logprobs_of(np.asarray(LOGITS, np.float32), 2, 3)
    assert found.token == 2 and found.logprob == pytest.approx(math.log(0.05), abs=1e-6)
    assert [id for id, _ in found.top] == [1, 3, 0]
    assert [math.exp(logprob) for _, logprob in found.top] == pytest.approx([0.5, 0.3, 0.15], abs=1e-6)
    picker = Picker(Sampling(0.01, repeat_penalty=1e9), recent=[1], logprobs=1)
    assert picker.pick(np.asarray(LOGITS, np.float32)) == 3
    assert picker.logprobs[0].logprob == pytest.approx(math.log(0.3), abs=1e-6)
    assert picker.logprobs[0].top[0][0] == 1


def test_nobody_asked_for_logprobs():
    generation = generate(ScriptedSession([4, 5]), [2], max_tokens=2)
    assert (list(generation), generation.logprobs) == ([4, 5], [])


def test_a_long_prompt_is_fed_in_parts_and_the_rest_is_left_to_next():
    calls: list[int] = []

    class Recorder(ScriptedSession):
        def prefill(self, tokens):
            calls.append(len(tokens))
            return super().prefill(tokens)

    session = Recorder([0, 0, 4, 1])
    generation = generate(session, [2, 3, 5, 6, 7], stop_ids={1})
    assert [generation.feed(2), generation.feed(2), generation.feed(2)] == [True, True, False]
    assert calls == [2, 2]
    assert list(generation) == [4]
    assert calls == [2, 2, 1, 1]
    assert session.seen == [2, 3, 5, 6, 7, 4]


class Choosing(ScriptedSession):
    """Chooses by itself, as a device does; notes how, and how many conversations took each step."""

    prefill_chunk = 2

    def __init__(self, script: list[int], noise: int | None = None) -> None:
        super().__init__(script)
        self.choices: list[Choice | None] = []
        self.noise = None if noise is None else np.random.default_rng(noise)

    def prefill(self, tokens):
        logits = super().prefill(tokens)
        return logits if self.noise is None else self.noise.normal(size=logits.size).astype(np.float32)

    def prefill_choose(self, tokens, choice):
        self.choices.append(choice)
        return choose(self.prefill(tokens), choice)

    def step_many(self, conversations, tokens, choices=None):
        assert list(conversations) == [self]
        self.choices += choices
        logits = self.prefill([*tokens])
        return [logits if choices[0] is None else choose(logits, choices[0])]

    def another(self):
        raise NotImplementedError

    def copy_prefix(self, source, length):
        raise NotImplementedError


def test_the_parts_of_next_are_next():
    whole = generate(ScriptedSession([4, 5, 6, 1]), [2, 3], stop_ids={1})
    assert list(whole) == [4, 5, 6]
    session = ScriptedSession([4, 5, 6, 1])
    generation = generate(session, [2, 3], stop_ids={1})
    assert (generation.pending(), next(generation)) == (None, 4)
    made = [4]
    while (token := generation.pending()) is not None:
        picked = generation.take(session.step(token))
        made += [] if picked is None else [picked]
    assert (made, generation.finish_reason, session.seen) == ([4, 5, 6], "stop", [2, 3, 4, 5, 6])


@pytest.mark.parametrize(("limit", "context", "reason"), [(2, 32, "length"), (None, 3, "context")])
def test_pending_says_when_an_answer_is_over(limit, context, reason):
    session = ScriptedSession([4, 5, 6], context=context)
    generation = generate(session, [2, 3], max_tokens=limit)
    next(generation)
    generation.take(session.step(generation.pending()))
    assert generation.pending() is None
    assert (generation.finish_reason, generation.tokens) == (reason, [4, 5])


def test_a_session_that_chooses_gets_one_draw_per_token_and_makes_the_host_s_text():
    sampling = Sampling(1.3, top_p=0.9, repeat_penalty=1.2, repeat_window=3, seed=5)
    chosen = Choosing([0] * 6, noise=3)
    there = list(generate(chosen, [2, 3], sampling, max_tokens=6))
    logits = np.random.default_rng(3)
    picker = Picker(sampling, recent=[2, 3])
    here = [picker.pick(logits.normal(size=16).astype(np.float32)) for _ in range(6)]
    assert there == here
    draws = np.random.default_rng(5)
    assert [choice.draw for choice in chosen.choices] == [draws.random() for _ in range(6)]
    assert chosen.choices[2].recent == (3, *there[:2])


def test_a_choice_stays_until_a_token_is_taken():
    generation = generate(ScriptedSession([4]), [2], Sampling(1.0, seed=5))
    assert generation.choice() == generation.choice()


@pytest.mark.parametrize("needs", [{"constraint": Forbid()}, {"logprobs": 0}])
def test_what_needs_logits_gets_them_from_a_session_that_could_choose(needs):
    session = Choosing([4, 5, 1])
    assert list(generate(session, [2], stop_ids={1}, **needs)) == [4, 5]
    assert session.choices == [None, None]  # and the prompt's came from `prefill`


def test_a_session_that_could_not_choose_says_so():
    class Broken(Choosing):
        def prefill_choose(self, tokens, choice):
            return -1

    with pytest.raises(FoxEdgeError, match="not numbers"):
        next(generate(Broken([4]), [2]))


def test_a_session_that_chooses_is_a_batching_one_and_another_is_not():
    assert isinstance(Choosing([]), BatchingSession)
    assert not isinstance(ScriptedSession([]), BatchingSession)
