"""The engine on a model that shows every mix-up: fairness, the queue, limits, hanging up, ending."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fox_edge.errors import FoxEdgeError
from runtimes.base import SharingSession
from runtimes.server.engine import Engine, Job, QueueFull, ShuttingDown
from runtimes.server.slots import CHUNK
from tests.runtimes.server.fakes import FakeSession, Family, Listener, answer_alone, ask


class Clock:
    """A clock that stands still until it is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def family() -> Family:
    return Family()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(family: Family, clock: Clock) -> Iterator[Engine]:
    """Two slots, two that may wait; each test starts it when all is prepared."""
    made = Engine(FakeSession(family=family), 2, 2, clock=clock)
    yield made
    if not made._thread.is_alive() and family.open:
        made.start()
    made.close()
    assert family.open == 0


def test_the_fake_is_a_session_that_shares() -> None:
    assert isinstance(FakeSession(), SharingSession)


def test_answers_are_those_of_a_lone_client_and_take_turns(engine: Engine) -> None:
    log: list[str] = []
    prompts = {"a": [1, 2, 3], "b": [4, 5], "c": [6], "d": [1, 2, 3, 9]}
    asked = {name: ask(engine, prompt, 6, Listener(name, log))[0] for name, prompt in prompts.items()}
    engine.start()
    for name, listener in asked.items():
        assert (listener.outcome.ending, listener.outcome.completion_tokens) == ("length", 6)
        assert listener.tokens == answer_alone(prompts[name], 6)
    # Two at a time; the second prompt is read in the round after the first one's.
    assert "".join(log[:12]) == "aabababababb"
    assert set(log[12:]) == {"c", "d"}


def test_a_long_prompt_is_run_in_parts_between_the_tokens_of_others(engine: Engine, family: Family) -> None:
    quick, long = list(range(5)), list(range(90)) * 4
    a, _ = ask(engine, quick, 12)
    b, _ = ask(engine, long, 3)
    engine.start()
    assert (a.outcome.ending, b.outcome.ending) == ("length", "length")
    assert (a.tokens, b.tokens) == (answer_alone(quick, 12), answer_alone(long, 3))
    parts = [n for number, what, n in family.calls if number == 1 and what == "prefill"]
    assert parts == [CHUNK] * 5 + [360 - 5 * CHUNK]
    # While its six parts ran, the other one never waited for more than one of them.
    first, last = (
        [i for i, (number, what, _) in enumerate(family.calls) if number == 1 and what == "prefill"][k]
        for k in (0, -1)
    )
    between = [(number, what) for number, what, _ in family.calls[first : last + 1]]
    assert between == [(1, "prefill"), (0, "step")] * 5 + [(1, "prefill")]


def test_two_long_prompts_are_read_in_turn_and_a_short_one_waits_for_no_long_one(clock: Clock) -> None:
    family = Family()
    engine = Engine(FakeSession(family=family), 3, 3, clock=clock)
    asked = [ask(engine, [n] * size, 2)[0] for n, size in ((1, 300), (2, 300), (3, 10))]
    engine.start()
    assert [listener.outcome.ending for listener in asked] == ["length"] * 3
    prefills = [number for number, what, _ in family.calls if what == "prefill"]
    assert prefills == [0, 1, 2, 0, 1, 0, 1, 0, 1, 0, 1]
    engine.close()


def test_a_bug_in_the_engine_leaves_nobody_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [ask(engine, [n])[0] for n in range(3)]

    def bug() -> None:
        if engine.busy:
            raise ZeroDivisionError

    monkeypatch.setattr(engine, "_round", bug)
    engine.start()
    assert [listener.outcome.ending for listener in asked] == ["error"] * 3
    assert engine.failed and "ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(ShuttingDown):
        ask(engine, [1])


def test_more_than_may_wait_are_refused_with_the_numbers(engine: Engine) -> None:
    waiting = [ask(engine, [n])[0] for n in range(4)]  # not started: nobody is served yet
    with pytest.raises(
        QueueFull, match=r"0 answers .* and 4 requests wait already, but only 2 \+ 2 are taken"
    ):
        ask(engine, [3])
    engine.start()
    assert [listener.outcome.ending for listener in waiting] == ["length"] * 4
    again, _ = ask(engine, [3])
    assert again.outcome.ending == "length"


def test_a_queue_of_none_still_serves_as_many_as_there_are_slots(clock: Clock) -> None:
    engine = Engine(FakeSession(), 1, 0, clock=clock)
    first, _ = ask(engine, [1])
    with pytest.raises(QueueFull):
        ask(engine, [2])
    engine.start()
    assert first.outcome.ending == "length"
    engine.close()


def test_who_hangs_up_frees_the_slot_at_the_next_token(engine: Engine, family: Family) -> None:
    listener = Listener()
    _, job = ask(engine, [1], 500, listener)
    listener.on_token = lambda it: job.cancel() if len(it.tokens) == 3 else None
    engine.start()
    assert (listener.outcome.ending, listener.outcome.completion_tokens) == ("cancelled", 3)
    assert len([call for call in family.calls if call[1] == "step"]) == 2
    assert engine.busy == 0


def test_who_hangs_up_while_waiting_never_runs(engine: Engine, family: Family) -> None:
    listener, job = ask(engine, [1])
    job.cancel()
    engine.start()
    assert (listener.outcome.ending, family.calls) == ("cancelled", [])


def test_a_reader_that_has_enough_ends_its_answer(engine: Engine, family: Family) -> None:
    listener = Listener()
    listener.on_token = lambda it: len(it.tokens) < 4
    ask(engine, [1], 500, listener)
    engine.start()
    assert (listener.outcome.ending, listener.outcome.completion_tokens) == ("read", 4)
    assert len([call for call in family.calls if call[1] == "step"]) == 3


def test_an_answer_that_takes_too_long_is_ended_and_so_is_one_that_waits(
    engine: Engine, clock: Clock
) -> None:
    def tick(listener: Listener) -> None:
        clock.now += 1

    slow = [Listener(), Listener()]
    for listener in slow:
        listener.on_token = tick
        ask(engine, [1], 500, listener, timeout_s=10)
    engine.start()
    for listener in slow:
        assert listener.outcome.ending == "timeout"
    assert 8 <= sum(len(listener.tokens) for listener in slow) <= 12
    assert all(listener.tokens == answer_alone([1], len(listener.tokens)) for listener in slow)


def test_time_is_counted_from_the_request_not_from_the_slot(clock: Clock) -> None:
    engine = Engine(FakeSession(), 1, 4, clock=clock)
    first, second = Listener(), Listener()

    def tick(listener: Listener) -> None:
        clock.now += 1

    first.on_token = tick
    ask(engine, [1], 20, first)
    ask(engine, [2], 20, second, timeout_s=15)
    engine.start()
    assert (second.outcome.ending, second.tokens) == ("timeout", [])
    assert first.outcome.ending == "length"
    engine.close()


def test_at_the_end_running_answers_are_finished_and_waiting_ones_told(clock: Clock) -> None:
    engine = Engine(FakeSession(), 1, 4, clock=clock)
    running, waiting = Listener(), Listener()
    running.on_token = lambda it: engine.drain(60) if len(it.tokens) == 2 else None
    ask(engine, [1], 9, running)
    ask(engine, [2], 9, waiting)
    engine.start()
    assert (waiting.outcome.ending, waiting.tokens) == ("shutdown", [])
    assert (running.outcome.ending, running.tokens) == ("length", answer_alone([1], 9))
    with pytest.raises(ShuttingDown, match="shutting down"):
        ask(engine, [3])
    engine.close()


def test_after_the_grace_time_running_answers_are_told_too(clock: Clock) -> None:
    engine = Engine(FakeSession(), 1, 4, clock=clock)
    running = Listener()

    def token(listener: Listener) -> None:
        clock.now += 1
        if len(listener.tokens) == 2:
            engine.drain(5)

    running.on_token = token
    ask(engine, [1], 500, running)
    engine.start()
    assert (running.outcome.ending, running.outcome.completion_tokens) == ("shutdown", 7)
    engine.close()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FoxEdgeError("the disk is gone"), "the disk is gone"),
        (ZeroDivisionError(), "internal error (ZeroDivisionError)"),
    ],
)
def test_a_model_that_fails_ends_one_answer_and_no_other(
    engine: Engine, family: Family, error: Exception, told: str
) -> None:
    def fail(number: int, tokens: list[int]) -> None:
        if number == 1 and any(call[:2] == (1, "step") for call in family.calls):
            raise error

    family.on_call = fail
    good, _ = ask(engine, [1, 2], 8)
    bad, _ = ask(engine, [3, 4], 8)
    engine.start()
    assert (bad.outcome.ending, bad.outcome.error) == ("error", told)
    assert (good.outcome.ending, good.tokens) == ("length", answer_alone([1, 2], 8))
    family.on_call = None
    # The slot is of use again, and nothing of what failed is left in it.
    again = [ask(engine, [3, 4], 8)[0] for _ in range(2)]
    assert all(listener.outcome.ending == "length" for listener in again)
    assert all(listener.tokens == answer_alone([3, 4], 8) for listener in again)


def test_a_job_that_is_refused_harms_nobody(engine: Engine) -> None:
    too_long, _ = ask(engine, [1] * 1001)
    fine, _ = ask(engine, [5])
    engine.start()
    assert too_long.outcome.ending == "error"
    assert "1001 tokens does not fit a context of 1000" in (too_long.outcome.error or "")
    assert (fine.outcome.ending, fine.tokens) == ("length", answer_alone([5], 5))


def test_a_full_context_ends_an_answer(clock: Clock) -> None:
    engine = Engine(FakeSession(context=8), 1, 1, clock=clock)
    listener, _ = ask(engine, [1, 2, 3], 99)
    engine.start()
    assert (listener.outcome.ending, listener.tokens) == ("context", answer_alone([1, 2, 3], 6))
    engine.close()


def test_logprobs_come_with_their_token(engine: Engine) -> None:
    listener = Listener()
    engine.submit(Job([1], listener, max_tokens=3, logprobs=2))
    engine.start()
    assert listener.outcome.ending == "length"
    tokens = [entry.token for entry in listener.logprobs if entry is not None]
    assert tokens == listener.tokens
    assert all(entry is not None and entry.top[0][0] == entry.token for entry in listener.logprobs)


def test_the_metrics_count_what_happened(engine: Engine) -> None:
    first, _ = ask(engine, [1] * 100, 4)
    engine.start()
    assert first.outcome.ending == "length"
    second, _ = ask(engine, [1] * 100, 4)
    assert second.outcome.cached_tokens == CHUNK
    counted = engine.metrics
    assert (counted.prompt_tokens, counted.cached_tokens, counted.decoded_tokens) == (200, CHUNK, 8)
    assert counted.answers == {"length": 2}
