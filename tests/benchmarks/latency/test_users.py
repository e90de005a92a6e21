"""Who is served when, and what the clock says, on sessions whose every millisecond is known; and on nano."""

import itertools

import numpy as np
import pytest

from benchmarks.common.subject import open_subject
from benchmarks.latency.measure import measure_waves, time_wave, timing, token_percentiles
from benchmarks.latency.users import CHUNK, Turn, open_users, time_conversation, time_users
from benchmarks.latency.workloads import find_workload, waves
from fox_edge.errors import FoxEdgeError
from runtimes.base import SessionOptions
from runtimes.generate import generate
from runtimes.lookup import LookupSession
from tests.benchmarks.fake_session import Clock, FakeSession


def test_a_chat_s_turn_costs_its_own_tokens_and_the_one_that_was_not_run():
    clock = Clock()
    session = FakeSession(clock)
    lengths = (60, 24, 45, 18, 120, 33)
    turns = time_conversation(session, [[1] * n for n in lengths], 64, clock)
    # After the first turn, the newest token of the answer before goes in front: no step has run it.
    assert [turn.prompt_tokens for turn in turns] == [60, 25, 46, 19, 121, 34]
    assert [n for _, what, n in session.log if what == "prefill"] == [60, 25, 46, 19, 121, 34]
    assert sum(what == "step" for _, what, _ in session.log) == 6 * 64
    # The cache is never begun anew: what was said stays.
    assert session.length == sum(lengths) + 6 * 65 - 1
    assert [turn.prompt_s for turn in turns] == pytest.approx([0.01 * t.prompt_tokens for t in turns])


def test_percentiles_are_of_all_times_between_tokens_and_of_nothing_else():
    clock = Clock()
    steps = np.random.default_rng(1).lognormal(-3, 0.6, 200)
    session = FakeSession(clock, token_s=5.0, steps_s=list(steps))
    turns = time_conversation(session, [[1, 2, 3], [4]], 100, clock)
    found = token_percentiles(turns)
    for q in (50, 95, 99):
        assert found[f"token_p{q}_s"] == pytest.approx(np.percentile(steps, q))


def test_one_user_s_figures_by_hand(monkeypatch):
    clock = Clock()
    session = FakeSession(clock, token_s=0.01, steps_s=(0.1, 0.3))
    found = measure_waves([session], [[[[1] * 50]], [[[1] * 150]]], 4, clock)
    assert found["prompt_tokens_per_s"] == pytest.approx(100)
    assert found["time_to_first_token_s"] == pytest.approx((0.5 + 1.5) / 2)
    assert found["cold_time_to_first_token_s"] == pytest.approx(0.5)
    assert found["decode_tokens_per_s"] == pytest.approx(5)
    assert found["total_tokens_per_s"] == pytest.approx(5)
    assert (found["passes"], found["output_tokens"], found["computed_prompt_tokens"]) == (1, 10, 200)


def test_several_users_are_served_in_turn():
    clock = Clock()
    first = FakeSession(clock, token_s=0.01, steps_s=(0.1,))
    sessions = open_users(first, 3, "a runtime")
    turns = time_users(sessions, [[[1] * 10]] * 3, 4, clock)
    names = [(name, what) for name, what, _ in first.log]
    p0, p1, p2 = [(n, "prefill") for n in range(3)]
    s0, s1, s2 = [(n, "step") for n in range(3)]
    assert names == [p0, p1, s0, p2, s0, s1, *[s0, s1, s2] * 2, s1, s2, s2]
    assert [turn.stamps_s[0] - turn.asked_s for turn in turns] == pytest.approx([0.1, 0.2, 0.4])
    # Of 12 tokens 4 are each user's; while anybody was answered 1.4 s passed (12 steps and 2 prompts).
    assert timing([turns]).total_tokens_per_s == pytest.approx(12 / 1.4)
    spans = [turn.stamps_s[-1] - turn.stamps_s[0] for turn in turns]
    assert timing([turns]).decode_tokens_per_s == pytest.approx(12 / sum(spans))


def test_a_long_prompt_holds_nobody_up_for_longer_than_a_part():
    clock = Clock()
    first = FakeSession(clock, token_s=0.01, steps_s=(0.1,))
    sessions = open_users(first, 2, "a runtime")
    turns = time_users(sessions, [[[1] * 4], [[1] * 1000]], 40, clock)
    gaps = np.diff(turns[0].stamps_s)
    assert gaps.max() <= CHUNK * 0.01 + 0.1 + 1e-9
    assert turns[1].prompt_s == pytest.approx(10)
    assert turns[1].prompt_tokens == 1000


def test_users_chat_too_and_ask_again_as_soon_as_they_were_answered():
    clock = Clock()
    first = FakeSession(clock)
    sessions = open_users(first, 2, "a runtime")
    turns = time_wave(sessions, [[[1] * 5, [1] * 7]] * 2, 3, clock)
    assert [turn.prompt_tokens for turn in turns] == [5, 8, 5, 8]
    assert [session.length for session in sessions] == [5 + 7 + 2 * 4 - 1] * 2


def test_time_in_which_nobody_is_answered_counts_for_nobody():
    waits = [Turn(1, 0.0, 0.5, [1.0, 2.0, 3.0]), Turn(1, 3.0, 4.0, [7.0, 8.0, 9.0])]
    assert timing([waits]).total_tokens_per_s == pytest.approx(4 / 4)
    both = [Turn(1, 0.0, 0.5, [1.0, 2.0, 3.0]), Turn(1, 0.0, 0.5, [2.0, 3.0, 4.0])]
    assert timing([both]).total_tokens_per_s == pytest.approx(4 / 3)


def test_sessions_that_cannot_share_say_so():
    with pytest.raises(
        FoxEdgeError, match=r"3 users need 3 conversations .* llama.cpp, opened like this, has one"
    ):
        open_users(LookupSession(FakeSession(Clock())), 3, "llama.cpp")


@pytest.mark.parametrize("runtime", ["torch", "llama.cpp"])
def test_users_of_nano_get_what_they_would_get_alone(nano_gguf, runtime):
    subject = open_subject("torch:nano" if runtime == "torch" else str(nano_gguf.path))
    assert subject.runtime == runtime
    wave = waves(find_workload("custom", 70, 6), subject.tokenizer(), 2)[0]
    session = subject.open_session(SessionOptions(context=128, threads=1, conversations=2))
    sessions = open_users(session, 2, subject.runtime)
    alone = []
    for (prompt,) in wave:
        session.reset()
        alone.append(list(itertools.islice(generate(session, prompt), 7)))
    given: list[list[int]] = [[], []]
    for n, each in enumerate(sessions):
        step = each.step
        each.step = lambda token, n=n, step=step: (given[n].append(token), step(token))[1]
    turns = time_users(sessions, wave, 6)
    assert given == [tokens[:-1] for tokens in alone]  # the last one is not run
    assert [len(turn.stamps_s) for turn in turns] == [7, 7]
    for turn in turns:
        assert list(turn.stamps_s) == sorted(turn.stamps_s)
    for each in sessions:
        each.close()
