"""Who is served when, and what the clock says, on sessions whose every millisecond is known; and on nano."""

import itertools

import numpy as np
import pytest

from benchmarks.common.subject import open_subject
from benchmarks.devices.roofline import Bandwidth
from benchmarks.latency.measure import measure_waves, time_wave, timing, token_percentiles
from benchmarks.latency.rows import row
from benchmarks.latency.users import (
    CHUNK,
    Turn,
    open_users,
    steps_together,
    time_conversation,
    time_users,
    users_in_a_pass,
)
from benchmarks.latency.workloads import find_workload, waves
from fox_edge.errors import FoxEdgeError
from runtimes.base import RemoteSession, SessionOptions, TimedTurn
from runtimes.generate import generate
from runtimes.lookup import LookupSession
from tests.benchmarks.fake_session import BatchingSession, Clock, FakeSession


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


class OwnClock(FakeSession):
    """A session in a program of its own: a turn of n tokens is asked at n, and the answer takes n seconds."""

    load_s = 1.25

    def converse(self, turns, decode_tokens):
        return [
            TimedTurn(
                len(turn),
                len(turn),
                0.5,
                [len(turn) * (1 + k / decode_tokens) for k in range(decode_tokens + 1)],
            )
            for turn in turns
        ]

    def occupied(self):
        raise NotImplementedError


def test_a_session_with_a_clock_of_its_own_is_believed():
    def no_clock():
        raise AssertionError("our clock has nothing to say")

    session = OwnClock(no_clock)
    assert isinstance(session, RemoteSession) and not isinstance(FakeSession(Clock()), RemoteSession)
    turns = time_conversation(session, [[1] * 4, [1] * 8], 2, no_clock)
    assert turns == [Turn(4, 4, 0.5, [4, 6, 8]), Turn(8, 8, 0.5, [8, 12, 16])]
    found = measure_waves([session], [[[[1] * 4, [1] * 8]]], 2, Clock())
    assert found["decode_tokens_per_s"] == pytest.approx(4 / (4 + 8))
    assert found["prompt_tokens_per_s"] == pytest.approx(12 / 1.0)
    assert session.log == []


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


def test_users_who_can_step_together_do_and_a_token_is_there_when_its_pass_is_done():
    clock = Clock()
    sessions = open_users(BatchingSession(clock, token_s=0.01), 3, "a runtime")
    assert steps_together(sessions) and not steps_together(sessions[:1])
    assert (users_in_a_pass(sessions), users_in_a_pass(sessions[:1])) == (3, 1)
    sessions[0].most_together = 2
    assert users_in_a_pass(sessions) == 2
    turns = time_users(sessions, [[[1] * 10]] * 3, 4, clock)
    passes = [who for _, what, who in sessions[0].log if what == "pass"]
    assert passes == [(0,), (0, 1), (0, 1, 2), (0, 1, 2), (1, 2), (2,)]
    # Rounds of 0.1 s for a prompt, 0.2 s for a prompt and a pass twice, then passes of 0.1 s.
    assert [turn.stamps_s[0] for turn in turns] == pytest.approx([0.1, 0.2, 0.4])
    assert turns[0].stamps_s == pytest.approx([0.1, 0.3, 0.5, 0.6, 0.7])
    assert turns[1].stamps_s == pytest.approx([0.2, 0.5, 0.6, 0.7, 0.8])
    assert turns[2].stamps_s == pytest.approx([0.4, 0.6, 0.7, 0.8, 0.9])
    assert [turn.prompt_s for turn in turns] == pytest.approx([0.1] * 3)
    # 12 tokens in the 0.8 s in which anybody was answered: 6 passes, and two prompts between them.
    assert timing([turns]).total_tokens_per_s == pytest.approx(12 / 0.8)


def test_a_session_s_own_part_of_a_prompt_is_what_others_wait_for():
    clock = Clock()
    sessions = open_users(BatchingSession(clock, token_s=0.01), 2, "a runtime")
    turns = time_users(sessions, [[[1] * 4], [[1] * 70]], 6, clock)
    assert [n for name, what, n in sessions[0].log if (name, what) == (1, "prefill")] == [32, 32, 6]
    assert np.diff(turns[0].stamps_s).max() == pytest.approx(0.01 * 32 + 0.1)


def test_one_user_of_a_session_that_chooses_has_tokens_chosen_there():
    clock = Clock()
    session = BatchingSession(clock)
    (turn,) = time_conversation(session, [[1] * 3], 5, clock)
    assert [what for _, what, _ in session.log] == ["prefill", *["pass"] * 5]
    assert turn.stamps_s == pytest.approx([0.03 + 0.1 * n for n in range(6)])


def test_the_ceiling_of_users_who_step_together_counts_the_weights_once():
    subject = open_subject("torch:nano")
    alone, four = subject.bytes_per_token(100), subject.bytes_per_token(100, 4)
    cache = 100 * subject.kv_bytes_per_position
    assert 4 * (four - cache) == pytest.approx(alone - cache, abs=4)
    run = {"total_tokens_per_s": 50.0, "decode_tokens_per_s": 12.5, "together": 4}
    found = row(subject, [run], Bandwidth(1e9, "by hand", 0, 1, {}), 100, 0.0)
    assert (found["together"], found["bytes_per_token"]) == (4, four)
    assert found["roofline_percent"] == pytest.approx(100 * 50 * four / 1e9)


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


def test_users_of_nano_in_one_pass_get_what_they_would_get_alone(nano_gguf):
    subject = open_subject(str(nano_gguf.path))
    wave = waves(find_workload("custom", 70, 6), subject.tokenizer(), 3)[0]
    session = subject.open_session(SessionOptions(context=128, threads=1, conversations=3))
    sessions = open_users(session, 3, subject.runtime)
    assert steps_together(sessions)
    alone = []
    for (prompt,) in wave:
        session.reset()
        alone.append(list(itertools.islice(generate(session, prompt), 7)))
    passes = []
    for each in sessions:
        each.step_many = lambda conversations, tokens, choices, real=each.step_many: passes.append(
            dict(zip(map(id, conversations), tokens, strict=True))
        ) or real(conversations, tokens, choices)
    time_users(sessions, wave, 6)
    given = [[step[id(each)] for step in passes if id(each) in step] for each in sessions]
    assert given == [tokens[:-1] for tokens in alone]
    assert max(map(len, passes)) == 3
    for each in sessions:
        each.close()


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_users_of_nano_get_what_they_would_get_alone(nano_onnx, runtime):
    subject = open_subject("torch:nano" if runtime == "torch" else str(nano_onnx.path))
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
