"""Conversations of one llama.cpp context that step together: each to the bit as if it were alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np
import pytest

from export.gguf import export_gguf
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ContextOverflowError, FoxEdgeError
from fox_edge.quant import GGUF, find_recipe
from runtimes.base import BatchingSession, SessionOptions, SharingSession, open_session
from runtimes.llama_cpp.context import CONTEXT_STEP, SHARED_BATCH, Context
from runtimes.llama_cpp.session import LlamaCppBatchingSession, LlamaCppSession
from runtimes.llama_cpp.together import MOST_ROWS
from runtimes.sampling import Choice, Sampling, choose

F32, FLASH_OFF = 0, 0
ONE = SessionOptions(context=200, threads=1)
THREE = dataclasses.replace(ONE, conversations=3)
TOKENS = [int(t) for t in np.random.default_rng(5).integers(8, 512, 190)]
Trio = tuple[LlamaCppBatchingSession, LlamaCppBatchingSession, LlamaCppBatchingSession]


@pytest.fixture(scope="module")
def artifact(tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_gguf(tiny_256, tmp_path_factory.mktemp("batching") / "out", find_recipe(GGUF, "f32"))


@pytest.fixture(autouse=True)
def exact_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 KV cache and plain attention, so that only mistakes are left as differences."""
    defaults = lib.llama_context_default_params

    def params() -> lib.llama_context_params:
        found = defaults()
        found.type_k = found.type_v = F32
        found.flash_attn_type = FLASH_OFF
        return found

    monkeypatch.setattr(lib, "llama_context_default_params", params)


@pytest.fixture
def alone(artifact: Artifact) -> Iterator[LlamaCppSession]:
    with LlamaCppSession(artifact, ONE) as session:
        yield session


def open_all(artifact: Artifact) -> Trio:
    first = open_session(artifact, THREE)
    assert isinstance(first, LlamaCppBatchingSession) and isinstance(first, BatchingSession)
    second = first.another()
    third = second.another()
    assert isinstance(second, LlamaCppBatchingSession) and isinstance(third, LlamaCppBatchingSession)
    return first, second, third


@pytest.fixture
def sessions(artifact: Artifact) -> Iterator[Trio]:
    opened = open_all(artifact)
    opened[0]._opened.limit = 3  # float32 kernels round otherwise for several rows: none would share a pass
    yield opened
    for session in opened:
        session.close()


def near(found: object, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-4)  # type: ignore[arg-type]


def expected_rows(alone: LlamaCppSession, prompt: list[int], steps: list[int]) -> list[np.ndarray]:
    """What a lone conversation says after a prompt and after every token behind it."""
    alone.reset()
    return [alone.prefill(prompt), *(alone.step(token) for token in steps)]


def test_without_being_asked_for_conversations_have_a_context_each(artifact: Artifact) -> None:
    with LlamaCppSession(artifact, ONE) as session:
        assert isinstance(session, SharingSession) and not isinstance(session, BatchingSession)
        with contextlib.closing(session.another()) as other:
            assert other._opened is not session._opened


def test_each_gets_the_logits_that_it_would_get_alone(sessions: Trio, alone: LlamaCppSession) -> None:
    prompts = [TOKENS[:20], TOKENS[30:75], TOKENS[80:81]]
    steps = [TOKENS[100:108], TOKENS[110:118], TOKENS[120:128]]
    expected = [expected_rows(alone, p, s) for p, s in zip(prompts, steps, strict=True)]
    for session, prompt, rows in zip(sessions, prompts, expected, strict=True):
        near(session.prefill(prompt), rows[0])
    for n in range(8):
        # In any order, whoever is asked, and now and then without one of them.
        who = [2, 0, 1] if n % 3 else [0, 2]
        for k in {0, 1, 2} - set(who):
            near(sessions[k].step(steps[k][n]), expected[k][n + 1])
        found = sessions[n % 3].step_many([sessions[k] for k in who], [steps[k][n] for k in who])
        for k, row in zip(who, found, strict=True):
            near(row, expected[k][n + 1])
    assert [session.length for session in sessions] == [28, 53, 9]


def test_rows_are_the_caller_s_own(sessions: Trio) -> None:
    for session in sessions:
        session.prefill(TOKENS[:3])
    (first, *_) = sessions[0].step_many(sessions, [9, 10, 11])
    assert isinstance(first, np.ndarray)
    kept = first.copy()
    sessions[0].step_many(sessions, [12, 13, 14])
    np.testing.assert_array_equal(first, kept)


def test_tokens_are_chosen_as_choices_say(sessions: Trio, alone: LlamaCppSession) -> None:
    warm = Choice(Sampling(1.5, top_p=0.9), draw=0.83)
    shy = Choice(Sampling(repeat_penalty=1e6), recent=tuple(range(0, 512, 2)))
    first = alone.prefill(TOKENS[:9])
    assert sessions[0].prefill_choose(TOKENS[:9], warm) == choose(first, warm)
    for session in sessions[1:]:
        session.prefill(TOKENS[:9])
    row = alone.step(77)
    found = sessions[1].step_many(sessions, np.array([77, 77, 77]), [warm, shy, None])  # type: ignore[arg-type]
    assert found[:2] == [choose(row, warm), choose(row, shy)]
    near(found[2], row)
    assert found[1] % 2 == 1


def test_a_prefix_is_handed_on_without_being_run(
    sessions: Trio, alone: LlamaCppSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, other = sessions
    source.prefill(TOKENS[:80])
    target.prefill(TOKENS[150:170])
    other.prefill(TOKENS[30:60])
    run = Context.run
    monkeypatch.setattr(Context, "run", lambda *_: pytest.fail("ran tokens"))
    target.copy_prefix(source, 64)
    monkeypatch.setattr(Context, "run", run)
    assert (target.length, source.length, other.length) == (64, 80, 30)
    rows = expected_rows(alone, [*TOKENS[:64], *TOKENS[90:100]], TOKENS[100:104])
    near(target.prefill(TOKENS[90:100]), rows[0])
    # Whoever had it first goes on, begins anew, and takes nothing from whom it was handed to.
    near(source.step(TOKENS[80]), expected_rows(alone, TOKENS[:81], [])[0])
    source.reset()
    source.prefill(TOKENS[:5])
    for token, row in zip(TOKENS[100:104], rows[1:], strict=True):
        near(target.step_many([target, other], [token, token])[0], row)
    source.copy_prefix(target, 0)
    assert source.length == 0
    with pytest.raises(FoxEdgeError, match="100 tokens cannot be copied from a conversation of 78"):
        source.copy_prefix(target, 100)


def test_truncating_one_leaves_the_others(sessions: Trio, alone: LlamaCppSession) -> None:
    for session in sessions:
        session.prefill(TOKENS[:50])
    sessions[1].truncate(20)
    near(sessions[1].prefill(TOKENS[60:70]), expected_rows(alone, [*TOKENS[:20], *TOKENS[60:70]], [])[0])
    near(sessions[0].step(TOKENS[50]), expected_rows(alone, TOKENS[:51], [])[0])
    chunks = list(sessions[2].score(TOKENS[50:70]))
    assert sum(map(len, chunks)) == 20
    near(chunks[-1][-1], expected_rows(alone, TOKENS[:70], [])[0])


def test_all_may_be_full_at_once(sessions: Trio, alone: LlamaCppSession) -> None:
    last = expected_rows(alone, TOKENS[:190] + TOKENS[:9], TOKENS[9:10])[1]
    for session in sessions:
        session.prefill(TOKENS[:190] + TOKENS[:9])
    for row in sessions[0].step_many(sessions, [TOKENS[9]] * 3):
        near(row, last)
    assert [session.length for session in sessions] == [200] * 3


def test_what_cannot_be_run_leaves_all_as_they_were(sessions: Trio, alone: LlamaCppSession) -> None:
    sessions[0].prefill(TOKENS[:20])
    sessions[1].prefill((TOKENS * 2)[:200])
    step_many = sessions[0].step_many
    with pytest.raises(ContextOverflowError, match="200 tokens and 1 more do not fit a context of 200"):
        step_many(sessions[:2], [5, 6])
    with pytest.raises(FoxEdgeError, match="vocabulary of 512"):
        step_many([sessions[0], sessions[2]], [5, 512])
    with pytest.raises(FoxEdgeError, match="named twice"):
        step_many([sessions[0], sessions[0]], [5, 6])
    with pytest.raises(FoxEdgeError, match="opened together"):
        step_many([sessions[0], alone], [5, 6])  # type: ignore[list-item]
    assert [session.length for session in sessions] == [20, 200, 0]
    near(step_many([sessions[0]], [TOKENS[20]])[0], expected_rows(alone, TOKENS[:21], [])[0])


def test_a_pass_that_fails_leaves_all_as_they_were(
    sessions: Trio, alone: LlamaCppSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [expected_rows(alone, TOKENS[k : k + 30], [TOKENS[60]])[1] for k in range(3)]
    for k, session in enumerate(sessions):
        session.prefill(TOKENS[k : k + 30])
    decode = lib.llama_decode

    def fails(context, batch):
        decode(context, batch)  # as far as it came
        return 2

    monkeypatch.setattr(lib, "llama_decode", fails)
    with pytest.raises(FoxEdgeError, match="failed with status 2 on 3 tokens after 30"):
        sessions[0].step_many(sessions, [5, 6, 7])
    monkeypatch.setattr(lib, "llama_decode", decode)
    assert [session.length for session in sessions] == [30] * 3
    for row, rows in zip(sessions[2].step_many(sessions, [TOKENS[60]] * 3), expected, strict=True):
        near(row, rows)


def test_logits_that_are_no_numbers_are_no_token(sessions: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Context.run

    def broken(*args):
        rows = run(*args).copy()
        rows[0, 7] = np.nan
        return rows

    for session in sessions:
        session.prefill([9])
    monkeypatch.setattr(Context, "run", broken)
    found = sessions[0].step_many(sessions, [5, 6, 7], [Choice()] * 3)
    assert found[0] == -1 and min(found[1:]) >= 0  # type: ignore[type-var]


def test_as_many_as_were_asked_for_and_no_more(artifact: Artifact) -> None:
    first, second, third = open_all(artifact)
    with pytest.raises(FoxEdgeError, match="opened for 3 conversations at once, and all are taken"):
        third.another()
    second.prefill(TOKENS[:40])
    second.close()
    # A place that is free again is empty.
    again = first.another()
    assert again.length == 0
    for session in (first, again, third):
        session.prefill(TOKENS[:30])
        session.close()
        session.close()
    with pytest.raises(FoxEdgeError, match="closed"):
        first.another()
    with pytest.raises(FoxEdgeError, match="closed"):
        third.step_many([third], [5])


def test_more_than_llama_cpp_can_tell_apart(artifact: Artifact) -> None:
    with pytest.raises(FoxEdgeError, match=r"257 conversations at once, but llama\.cpp takes 256"):
        LlamaCppSession(artifact, dataclasses.replace(ONE, conversations=257))


def test_memory_is_reckoned_for_one_set_of_buffers_and_a_cache_each(artifact: Artifact) -> None:
    shared = SHARED_BATCH  # so short a context has no larger batch alone either
    alone = LlamaCppSession.need(artifact, dataclasses.replace(ONE, context=shared, flash_attention=False))
    three = LlamaCppSession.need(artifact, dataclasses.replace(THREE, context=shared))
    apart = LlamaCppSession.need(artifact, dataclasses.replace(THREE, context=shared, flash_attention=True))
    rows = 2 * 4 * 512 * 3
    assert three.cache(200) == apart.cache(200) == 3 * alone.cache(CONTEXT_STEP)
    assert three.buffers == alone.buffers + rows
    assert three.scratch_per_position == alone.scratch_per_position == shared * 4 * (1 + 4)
    assert apart.scratch_per_position == 3 * shared * 2


@pytest.mark.parametrize(
    ("choices", "together"),
    [
        ({}, True),
        ({"conversations": 1}, False),
        ({"flash_attention": False}, True),
        ({"flash_attention": True}, False),  # a lone token's attention would be split among threads
        ({"flash_attention": True, "kv": "q8_0"}, True),
        ({"flash_attention": True, "fixed_batch": False}, True),
    ],
)
def test_who_has_a_context_in_common(artifact: Artifact, choices: dict[str, object], together: bool) -> None:
    options = dataclasses.replace(THREE, **choices)  # type: ignore[arg-type]
    with LlamaCppSession(artifact, options) as session:
        assert isinstance(session, LlamaCppBatchingSession) == together


# --- to the bit -----------------------------------------------------------------------------------


def passes_of(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The sequences of every pass from now on that has no prompt in it."""
    seen: list[list[int]] = []
    run = Context.run

    def noted(self, tokens, positions, sequences, wanted):
        if len(set(sequences)) == len(sequences):
            seen.append(list(sequences))
        return run(self, tokens, positions, sequences, wanted)

    monkeypatch.setattr(Context, "run", noted)
    return seen


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_bits_do_not_depend_on_who_else_steps(
    quant: str, kv: str, tiny_256: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # llama.cpp's own cache and attention
    made = export_gguf(tiny_256, tmp_path / "out", find_recipe(GGUF, quant), rounding="nearest")
    options = SessionOptions(context=256, threads=2, conversations=9, kv=kv)
    first = LlamaCppSession(made, options)
    assert isinstance(first, LlamaCppBatchingSession)
    sessions = [first, *(first.another() for _ in range(8))]
    limit = first._opened.limit
    assert 1 <= limit <= MOST_ROWS
    lengths = [5, 250, 40, 3, 100, 8, 64, 17, 30]
    for n, (session, length) in enumerate(zip(sessions, lengths, strict=True)):
        session.prefill((TOKENS * 2)[n : n + length])
    alone = []
    for n, session in enumerate(sessions):
        alone.append(session.step(TOKENS[n]))
        session.truncate(lengths[n])
    for who in ([0, 1], [2, 0], [1, 3, 8], [4, 5, 6], [0, 2, 4, 6, 8], [8, 7, 6, 5, 4, 3], list(range(9))):
        seen = passes_of(monkeypatch)
        found = first.step_many([sessions[n] for n in who], [TOKENS[n] for n in who])
        assert max(map(len, seen)) <= limit
        for n, row in zip(who, found, strict=True):
            assert np.array_equal(row, alone[n]), f"{n} of {who}"
            assert sessions[n].length == lengths[n] + 1
            sessions[n].truncate(lengths[n])
        # Who was only made use of to have the others side by side has not noticed.
        assert [session.length for session in sessions] == lengths
        assert [first._opened.length(n) for n in range(9)] == lengths
    for session in sessions:
        session.close()


def test_a_gap_of_one_is_filled_and_a_full_neighbour_s_is_not(
    sessions: Trio, alone: LlamaCppSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions[0]._opened, "limit", 3)
    for session in sessions:
        session.prefill(TOKENS[:10])
    expected = expected_rows(alone, TOKENS[:10], [5])[1]
    seen = passes_of(monkeypatch)
    near(sessions[0].step_many([sessions[0], sessions[2]], [5, 5])[1], expected)
    assert seen.pop() == [0, 1, 2] and sessions[1].length == 10
    near(sessions[1].step(5), expected)
    # Cells come in steps: a context of 200 has 256, and this pretends that they were taken.
    monkeypatch.setattr(sessions[0]._opened, "cells", 11)
    sessions[0].step_many([sessions[0], sessions[2]], [6, 6])
    assert seen.pop() == [0, 2]


def test_passes_are_no_larger_than_agrees_and_even(sessions: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = passes_of(monkeypatch)
    for limit, sizes in ((1, [1, 1, 1]), (2, [2, 1]), (3, [3])):
        monkeypatch.setattr(sessions[0]._opened, "limit", limit)
        seen.clear()
        sessions[0].step_many(sessions, [5, 6, 7])
        assert list(map(len, seen)) == sizes


def test_a_pass_that_fails_after_another_leaves_all_as_they_were(
    sessions: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions[0]._opened, "limit", 2)
    for session in sessions:
        session.prefill(TOKENS[:10])
    run, count = Context.run, iter(range(10))

    def second_fails(*args):
        if next(count) == 1:
            raise FoxEdgeError("no more")
        return run(*args)

    monkeypatch.setattr(Context, "run", second_fails)
    with pytest.raises(FoxEdgeError, match="no more"):
        sessions[0].step_many(sessions, [5, 6, 7])
    assert [session.length for session in sessions] == [10] * 3
    assert [sessions[0]._opened.length(n) for n in range(3)] == [10] * 3


@pytest.mark.parametrize("wrong_from", [2, 3, 4, 99])
def test_how_many_agree_is_found_out_and_leaves_nothing_behind(
    wrong_from: int, tiny_256: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that sums otherwise from so many rows on."""
    monkeypatch.undo()
    made = export_gguf(tiny_256, tmp_path / "out", find_recipe(GGUF, "int8"), rounding="nearest")
    five = dataclasses.replace(ONE, conversations=5)
    with LlamaCppSession(made, five) as session:
        found = session._opened.limit
    run = Context.run

    def otherwise(self, tokens, positions, sequences, wanted):
        rows = run(self, tokens, positions, sequences, wanted)
        return np.nextafter(rows, np.float32(np.inf)) if sum(wanted) >= wrong_from else rows

    monkeypatch.setattr(Context, "run", otherwise)
    with LlamaCppSession(made, five) as session:
        assert session._opened.limit == min(wrong_from - 1, found)
        assert [session._opened.length(n) for n in range(5)] == [0] * 5
    with LlamaCppSession(made, dataclasses.replace(five, fixed_batch=False)) as loose:
        assert loose._opened.limit == loose._opened.rows
