"""The engine on a model whose conversations step together: one pass a round, and nobody is mixed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from fox_edge.errors import FoxEdgeError
from runtimes.base import BatchingSession
from runtimes.sampling import Choice, Sampling
from runtimes.server.engine import Engine
from tests.runtimes.server.fakes import BatchingFake, Family, Listener, answer_alone, ask


@pytest.fixture
def family() -> Family:
    return Family()


@pytest.fixture
def engine(family: Family) -> Iterator[Engine]:
    """Four slots, four that may wait; each test starts it when all is prepared."""
    made = Engine(BatchingFake(family=family), 4, 4)
    yield made
    if not made._thread.is_alive() and family.open:
        made.start()
    made.close()
    assert family.open == 0


def passes(family: Family) -> Counter[tuple[str, int]]:
    """How often something was run, by what and for how many tokens; a lone answer's steps count as passes."""
    return Counter((what, size) for _, what, size in family.calls if what != "prefill")


def test_the_fake_is_a_session_that_batches() -> None:
    assert isinstance(BatchingFake(), BatchingSession)


def test_all_answers_grow_by_one_pass_a_round(engine: Engine, family: Family) -> None:
    prompts = [[1, 2, 3], [4, 5], [6], [1, 2, 3, 9]]
    asked = [ask(engine, prompt, 10)[0] for prompt in prompts]
    engine.start()
    for prompt, listener in zip(prompts, asked, strict=True):
        assert (listener.outcome.ending, listener.tokens) == ("length", answer_alone(prompt, 10))
    # First tokens come in rounds 1 to 4, and then each answer has nine steps to go: the first one is alone in
    # round 2, all four go together in rounds 5 to 10, and the last one is alone in round 13.
    assert passes(family) == {
        ("step_many", 1): 2,
        ("step_many", 2): 2,
        ("step_many", 3): 2,
        ("step_many", 4): 6,
    }


def test_tokens_are_chosen_there_but_for_those_whose_logits_are_asked_for(
    engine: Engine, family: Family
) -> None:
    class Low:
        """Allows small ids only, and no stop token."""

        def apply(self, logits):
            logits[0], logits[10:] = -np.inf, -np.inf

        def accept(self, token):
            assert token < 10

    warm = Sampling(0.8, seed=3)
    chosen, _ = ask(engine, [1], 6, sampling=warm)
    held, _ = ask(engine, [2], 6, constraint=Low())
    told, _ = ask(engine, [3], 6, logprobs=1)
    engine.start()
    assert [it.outcome.ending for it in (chosen, held, told)] == ["length"] * 3
    assert told.tokens == answer_alone([3], 6)
    assert [entry.token for entry in told.logprobs if entry] == told.tokens
    assert max(held.tokens) < 10
    threes = [choices for choices in family.choices if len(choices) == 3]
    assert threes and all(choices[1:] == [None, None] for choices in threes)
    draws = np.random.default_rng(3).random(6)
    used = [choices[0].draw for choices in family.choices if isinstance(choices[0], Choice)]
    assert used == [draw for draw in draws[1:]]  # the first one chose the first token


def test_a_long_prompt_is_run_in_the_session_s_own_parts(engine: Engine, family: Family) -> None:
    long = list(range(90)) * 2
    a, _ = ask(engine, [1], 20)
    b, _ = ask(engine, long, 3)
    engine.start()
    assert (a.outcome.ending, b.outcome.ending) == ("length", "length")
    assert (a.tokens, b.tokens) == (answer_alone([1], 20), answer_alone(long, 3))
    parts = [n for number, what, n in family.calls if number == 1 and what == "prefill"]
    assert parts == [16] * 11 + [180 - 11 * 16]
    again, _ = ask(engine, [*long[:100], 7], 3)
    assert again.outcome.cached_tokens == 96


def test_who_leaves_is_in_no_further_pass(engine: Engine, family: Family) -> None:
    leaving, staying = Listener(), Listener()
    _, job = ask(engine, [1], 500, leaving)
    leaving.on_token = lambda it: job.cancel() if len(it.tokens) == 4 else None
    ask(engine, [2], 30, staying)
    engine.start()
    assert (staying.outcome.ending, staying.tokens) == ("length", answer_alone([2], 30))
    assert (leaving.outcome.ending, leaving.outcome.completion_tokens) == ("cancelled", 4)
    assert passes(family)[("step_many", 2)] == 2
    assert sum(n for (_, n), count in passes(family).items() for _ in range(count)) == 3 + 29


def test_a_full_context_ends_one_answer_and_no_other(family: Family) -> None:
    engine = Engine(BatchingFake(context=12, family=family), 2, 2)
    asked = [ask(engine, prompt, 99)[0] for prompt in ([1, 2, 3, 4, 5, 6], [7])]
    engine.start()
    assert [(it.outcome.ending, len(it.tokens)) for it in asked] == [("context", 7), ("context", 12)]
    assert asked[1].tokens == answer_alone([7], 12)
    engine.close()


@pytest.mark.parametrize("error", [FoxEdgeError("the disk is gone"), ZeroDivisionError()])
def test_an_answer_that_fails_ends_alone_though_it_was_in_a_pass_with_others(
    engine: Engine, family: Family, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(number: int, tokens: list[int]) -> None:
        if number == 1 and held > 4:
            raise error

    held = 0

    def count(listener: Listener) -> None:
        nonlocal held
        held = len(listener.tokens)

    family.on_call = fail
    prompts = [[1], [2], [3]]
    bad = Listener()
    bad.on_token = count
    asked = [ask(engine, prompt, 12, bad if n == 1 else None)[0] for n, prompt in enumerate(prompts)]
    engine.start()
    assert [it.outcome.ending for it in asked] == ["length", "error", "length"]
    assert asked[0].tokens == answer_alone([1], 12) and asked[2].tokens == answer_alone([3], 12)
    assert bad.tokens == answer_alone([2], 5)
    assert capsys.readouterr().err.count("a pass for 3 answers at once failed") == 1
    # Nobody's token was run twice: what the failed pass had begun was taken back.
    family.on_call = None
    again, _ = ask(engine, [2], 12)
    assert (again.outcome.ending, again.tokens) == ("length", answer_alone([2], 12))


def test_logits_that_are_no_numbers_end_one_answer_and_no_other(
    engine: Engine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_many = BatchingFake.step_many

    def broken(self, conversations, tokens, choices=None):
        results = step_many(self, conversations, tokens, choices)
        return [-1 if c.number == 1 else r for c, r in zip(conversations, results, strict=True)]

    monkeypatch.setattr(BatchingFake, "step_many", broken)
    asked = [ask(engine, [n], 8)[0] for n in range(1, 4)]
    engine.start()
    assert [it.outcome.ending for it in asked] == ["length", "error", "length"]
    assert "not numbers" in (asked[1].outcome.error or "")
    assert asked[2].tokens == answer_alone([3], 8)
