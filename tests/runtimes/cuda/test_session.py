"""Conversations on the CPU by the GPU's code: against the reference model, called once on everything."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ContextOverflowError, FoxEdgeError
from runtimes.base import SCORE_CHUNK, BatchingSession, Logits, SessionOptions
from runtimes.cuda import model, prompts
from runtimes.cuda.session import CudaSession
from runtimes.generate import generate
from runtimes.sampling import Choice, Sampling, choose
from runtimes.torch import TorchSession

IDS = [int(t) for t in np.random.default_rng(3).integers(8, 512, 240)]
OPTIONS = SessionOptions(device="cpu", conversations=4, threads=1)


def relative(got: Logits | int, want: np.ndarray) -> float:
    assert isinstance(got, np.ndarray) and got.dtype == np.float32 and got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def whole(checkpoint: Checkpoint) -> np.ndarray:
    """Logits after each of IDS, by one plain call of the reference."""
    with torch.inference_mode():
        return checkpoint.load_model()(torch.tensor([IDS]))[0].numpy()


@pytest.fixture(scope="module", params=["tied", "untied", "grouped"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    names = {"tied": "tiny", "untied": "tiny_untied", "grouped": "tiny_256"}
    found: Checkpoint = request.getfixturevalue(names[request.param])
    return found


@pytest.fixture(scope="module")
def want(checkpoint: Checkpoint) -> np.ndarray:
    return whole(checkpoint)


@pytest.fixture
def session(checkpoint: Checkpoint) -> Iterator[CudaSession]:
    opened = CudaSession(checkpoint, OPTIONS, torch.float32)
    yield opened
    opened.close()


def test_it_is_a_batching_session_of_the_whole_context(session: CudaSession) -> None:
    assert isinstance(session, BatchingSession)
    assert (session.context, session.vocab_size, session.length) == (256, 512, 0)
    assert session.prefill_chunk == 64


def test_prompts_in_chunks_steps_and_truncation(
    session: CudaSession, want: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "CPU_CHUNK", 64)
    assert relative(session.prefill(IDS[:170]), want[169]) < 1e-5
    for n in range(170, 175):
        assert relative(session.step(IDS[n]), want[n]) < 1e-5
    session.prefill([7, 8, 9])
    session.truncate(175)
    assert session.length == 175
    assert relative(session.prefill(IDS[175:]), want[-1]) < 1e-5
    session.reset()
    assert session.length == 0
    assert relative(session.prefill(IDS[:1]), want[0]) < 1e-5


@pytest.mark.parametrize("start", [0, 1, SCORE_CHUNK, 150])
def test_score_gives_every_row_from_a_start(
    session: CudaSession, want: np.ndarray, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "CPU_CHUNK", 48)
    session.prefill(IDS[:3])
    chunks = list(session.score(IDS[3:], start))
    assert max(len(c) for c in chunks) <= SCORE_CHUNK
    assert relative(np.concatenate(chunks), want[3 + start :]) < 1e-5
    assert session.length == 240


def test_conversations_of_mixed_lengths_take_a_step_together(session: CudaSession, want: np.ndarray) -> None:
    lengths = (200, 1, 33)
    all_of_them = [session, session.another(), session.another()]
    for one, length in zip(all_of_them, lengths, strict=True):
        one.prefill(IDS[:length])
    for n in range(5):
        found = session.step_many(all_of_them, [IDS[length + n] for length in lengths])
        for logits, length in zip(found, lengths, strict=True):
            assert relative(logits, want[length + n]) < 1e-5
    assert [one.length for one in all_of_them] == [205, 6, 38]
    for one in all_of_them[1:]:
        one.close()


def test_a_copied_prefix_is_the_same_to_the_bit(session: CudaSession, want: np.ndarray) -> None:
    session.prefill(IDS[:100])
    other = session.another()
    other.prefill(IDS[50:80])
    other.copy_prefix(session, 64)
    got = [other.prefill(IDS[64:80]), *(other.step(t) for t in IDS[80:90])]
    session.truncate(64)
    again = [session.prefill(IDS[64:80]), *(session.step(t) for t in IDS[80:90])]
    assert np.array_equal(np.stack(got), np.stack(again))
    assert relative(np.stack(got), want[79:90]) < 1e-5
    with pytest.raises(FoxEdgeError, match="91 tokens cannot be copied from a conversation of 90"):
        session.copy_prefix(other, 91)
    other.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_s_bits_do_not_depend_on_who_else_asks(dtype: torch.dtype, tiny_256: Checkpoint) -> None:
    session = CudaSession(tiny_256, OPTIONS, dtype)
    session.prefill(IDS[:20])
    alone = np.stack([session.step(t) for t in IDS[20:30]])
    others = [session.another() for _ in range(3)]
    for n, other in enumerate(others):
        other.prefill(IDS[100 : 110 + 40 * n])
    for place in range(4):
        session.truncate(20)
        found = []
        for t in IDS[20:30]:
            together = [*others[:place], session, *others[place : 1 + place]]
            result = others[0].step_many(together, [t if one is session else t + 1 for one in together])
            found.append(result[together.index(session)])
        assert np.array_equal(np.stack(found), alone)  # type: ignore[arg-type]
    for one in (session, *others):
        one.close()


def test_without_a_fixed_size_a_batch_is_as_large_as_it_must_be(tiny: Checkpoint) -> None:
    session = CudaSession(tiny, SessionOptions(device="cpu", conversations=5, fixed_batch=False))
    fixed = CudaSession(tiny, SessionOptions(device="cpu", conversations=5))
    sizes = [[one._loaded()._decoder.size(rows) for rows in (1, 2, 3, 5)] for one in (session, fixed)]
    assert sizes == [[1, 2, 4, 8], [8, 8, 8, 8]]


CHOICES = [
    Choice(),
    Choice(Sampling(temperature=0.8, top_p=0.9, top_k=50), 0.61),
    Choice(Sampling(repeat_penalty=1.4), 0.0, tuple(IDS[:30])),
]


def test_tokens_are_chosen_where_the_logits_are(tiny: Checkpoint) -> None:
    session = CudaSession(tiny, OPTIONS, torch.float32)
    conversations = [session, *(session.another() for _ in range(3))]
    rows = [one.prefill(IDS[: 40 + n]) for n, one in enumerate(conversations)]
    for one in conversations:
        one.reset()
    for n, (one, choice) in enumerate(zip(conversations, CHOICES, strict=False)):
        assert one.prefill_choose(IDS[: 40 + n], choice) == choose(rows[n], choice)
    conversations[3].prefill(IDS[:43])
    found = session.step_many(conversations, IDS[40:44], [*CHOICES, None])
    for one, length in zip(conversations, (40, 41, 42, 43), strict=True):
        one.truncate(length)
    logits = session.step_many(conversations, IDS[40:44])
    want = [choose(row, choice) for row, choice in zip(logits, CHOICES, strict=False)]  # type: ignore[arg-type]
    assert found[:3] == want
    assert np.array_equal(found[3], logits[3])


def test_more_steps_than_the_largest_batch(tiny: Checkpoint) -> None:
    options = SessionOptions(device="cpu", conversations=70, context=16)
    first = CudaSession(tiny, options, torch.float32)
    conversations = [first, *(first.another() for _ in range(69))]
    tokens = [8 + n for n in range(70)]
    found = first.step_many(conversations, tokens, [Choice()] * 70)
    for one in conversations:
        one.reset()
    assert found == [int(one.step(t).argmax()) for one, t in zip(conversations, tokens, strict=True)]


# --- slots -----------------------------------------------------------------------------------------------


def test_slots_are_taken_and_given_back_in_any_order(tiny: Checkpoint) -> None:
    first = CudaSession(tiny, SessionOptions(device="cpu", conversations=2))
    second = first.another()
    with pytest.raises(FoxEdgeError, match="opened for 2 conversations at a time, and another one"):
        second.another()
    want = second.prefill(IDS[:9])
    first.close()
    first.close()
    third = second.another()
    third.prefill(IDS[20:60])
    second.reset()
    assert np.array_equal(second.prefill(IDS[:9]), want)
    second.close()
    assert third.another().length == 0
    for closed in (first, second):
        with pytest.raises(FoxEdgeError, match="closed"):
            closed.another()


def test_who_leaves_in_mid_answer_disturbs_nobody(tiny: Checkpoint) -> None:
    first = CudaSession(tiny, OPTIONS, torch.float32)
    leaving, staying = first.another(), first.another()
    answer = generate(leaving, IDS[:20], max_tokens=50)
    alone = list(generate(staying, IDS[30:50], max_tokens=12))
    staying.reset()
    slow = generate(staying, IDS[30:50], max_tokens=12)
    got = [next(slow), next(answer) * 0 + next(slow)]
    leaving.close()
    with pytest.raises(FoxEdgeError, match="closed"):
        next(answer)
    newcomer = first.another()
    newcomer.prefill(IDS[90:160])
    assert got + list(slow) == alone


def test_steps_that_cannot_be_taken_leave_all_as_they_were(tiny: Checkpoint) -> None:
    options = SessionOptions(device="cpu", conversations=2, context=16)
    first = CudaSession(tiny, options, torch.float32)
    second, stranger = first.another(), CudaSession(tiny, options, torch.float32)
    first.prefill(IDS[:16])
    second.prefill(IDS[:4])
    for conversations, tokens, message in (
        ([first, second], [1, 1], "16 tokens and 1 more do not fit a context of 16"),
        ([second, second], [1, 2], "only one step at a time"),
        ([second, stranger], [1, 2], "on the same weights"),
        ([first, second, stranger], [1, 1, 1], "3 conversations are to take a step, but .* opened for 2"),
        ([second], [512], "512"),
    ):
        with pytest.raises(FoxEdgeError, match=message):
            first.step_many(conversations, tokens)
        assert (first.length, second.length, stranger.length) == (16, 4, 0)
    assert first.step_many([], []) == []


def test_too_many_tokens_are_refused_with_the_cache_untouched(tiny: Checkpoint) -> None:
    session = CudaSession(tiny, SessionOptions(device="cpu", context=16))
    session.prefill(IDS[:10])
    with pytest.raises(ContextOverflowError, match="10 tokens and 7 more do not fit a context of 16"):
        session.prefill(IDS[:7])
    with pytest.raises(ContextOverflowError):
        session.score(IDS[:7])
    assert session.length == 10


def test_a_context_beyond_the_model_is_refused(tiny: Checkpoint) -> None:
    with pytest.raises(ContextOverflowError, match="257 positions was asked for, but 1 to 256"):
        CudaSession(tiny, SessionOptions(device="cpu", context=257))


def test_choices_that_do_not_go_are_refused(tiny: Checkpoint) -> None:
    with pytest.raises(FoxEdgeError, match="--kv q8_0: the CUDA runtime has bfloat16"):
        CudaSession(tiny, SessionOptions(device="cpu", kv="q8_0"))
    with pytest.raises(FoxEdgeError, match="0 conversations"):
        CudaSession(tiny, SessionOptions(device="cpu", conversations=0))


# --- text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("question", ["Tom has 3 apples and buys 5 more.", "The fox"])
def test_greedy_text_is_the_reference_s(nano: Checkpoint, dtype: torch.dtype, question: str) -> None:
    tokenizer, options = nano.tokenizer(), SessionOptions(context=96, device="cpu", threads=1)
    assert tokenizer.bos_id is not None
    prompt = [tokenizer.bos_id, *tokenizer.encode(question)]
    want = list(generate(TorchSession(nano, options, dtype), prompt, max_tokens=64))
    assert len(want) == 64
    assert list(generate(CudaSession(nano, options, dtype), prompt, max_tokens=64)) == want


# --- steps begun before they are asked for -----------------------------------------------------------------


@pytest.fixture
def ahead(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[CudaSession, list[str]]]:
    """A session that looks ahead, as on a GPU, and the names of the steps that its decoder runs."""
    session = CudaSession(tiny, OPTIONS, torch.float32)
    model, steps = session._loaded(), list[str]()
    model.looks_ahead = True
    decoder = model._decoder
    for name in ("run", "run_on"):
        real = getattr(decoder, name)
        monkeypatch.setattr(decoder, name, lambda *a, name=name, real=real: steps.append(name) or real(*a))
    yield session, steps
    session.close()


def test_looking_ahead_changes_no_text(ahead: tuple[CudaSession, list[str]], tiny: Checkpoint) -> None:
    session, steps = ahead
    plain = CudaSession(tiny, OPTIONS, torch.float32)
    want = list(generate(plain, IDS[:30], max_tokens=20))
    assert list(generate(session, IDS[:30], max_tokens=20)) == want
    # The first of 19 steps is asked for, all others are there already, and one too many.
    assert steps == ["run"] + 19 * ["run_on"]
    session.truncate(30)
    plain.truncate(30)
    assert np.array_equal(session.step(9), plain.step(9))  # what was begun lies behind the end


def test_a_step_that_was_begun_is_void_after_anything_else(
    ahead: tuple[CudaSession, list[str]], tiny: Checkpoint
) -> None:
    session, _ = ahead
    other, plain = session.another(), CudaSession(tiny, OPTIONS, torch.float32)
    plain.prefill([*IDS[40:59], IDS[19], 7])
    other.prefill(IDS[40:59])
    for change in (
        lambda: session.prefill([*IDS[40:59], IDS[19]]),
        lambda: (session.copy_prefix(other, 19), session.step(IDS[19])),
        lambda: list(session.score([*IDS[40:59], IDS[19]])),
    ):
        session.reset()
        session.prefill(IDS[:19])
        token = session.step_many((session,), (IDS[19],), (Choice(),))[0]
        assert isinstance(token, int) and session.length == 20
        session.reset()
        change()
        assert session.length == 20
        plain.truncate(20)
        assert relative(session.step(token), plain.step(token)) < 1e-5
    other.close()


def test_the_end_of_the_context_is_not_passed(tiny: Checkpoint) -> None:
    session = CudaSession(tiny, SessionOptions(device="cpu", context=12), torch.float32)
    session._loaded().looks_ahead = True
    answer = generate(session, IDS[:8], max_tokens=50)
    assert len(list(answer)) == 5 and answer.finish_reason == "context"


def test_every_choice_may_follow_a_greedy_one(ahead: tuple[CudaSession, list[str]], tiny: Checkpoint) -> None:
    session, steps = ahead
    plain = CudaSession(tiny, OPTIONS, torch.float32)
    for one in (session, plain):
        one.prefill(IDS[:10])
    token = session.step_many((session,), (IDS[10],), (Choice(),))[0]
    assert plain.step_many((plain,), (IDS[10],), (Choice(),)) == [token]
    assert isinstance(token, int)
    rows = [one.step(token) for one in (session, plain)]
    assert steps == ["run", "run_on"] and np.array_equal(*rows)


def answers(conversations: list[CudaSession], steps: int, leaving: dict[int, int]) -> list[list[int]]:
    """Greedy tokens of conversations that step together; `leaving`: place -> the step it does not take."""
    begins = [IDS[10 * n : 10 * n + 20 + n] for n in range(len(conversations))]
    found = [[one.prefill_choose(ids, Choice())] for one, ids in zip(conversations, begins, strict=True)]
    for step in range(steps):
        here = [n for n in range(len(conversations)) if leaving.get(n, steps) > step]
        ours = [conversations[n] for n in here]
        got = ours[0].step_many(ours, [found[n][-1] for n in here], [Choice()] * len(here))
        for n, token in zip(here, got, strict=True):
            assert isinstance(token, int)
            found[n].append(token)
    return found


@pytest.mark.parametrize("leaving", [{}, {2: 9}, {0: 7}, {0: 9, 2: 4}])
def test_several_conversations_are_run_ahead_too(
    ahead: tuple[CudaSession, list[str]],
    tiny: Checkpoint,
    leaving: dict[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "CALM_STEPS", 3)
    session, steps = ahead
    plain = CudaSession(tiny, OPTIONS, torch.float32)
    want = answers([plain, plain.another(), plain.another()], 12, leaving)
    assert answers([session, session.another(), session.another()], 12, leaving) == want
    # The first three are too early, then one is begun at every step; who leaves costs one that is run anew.
    assert steps[:5] == ["run", "run", "run", "run", "run_on"]
    assert steps.count("run") == 4 + len({step for step in leaving.values() if step > 3})


def test_a_newcomer_makes_what_was_begun_void(
    ahead: tuple[CudaSession, list[str]], tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "CALM_STEPS", 2)
    session, steps = ahead
    plain = CudaSession(tiny, OPTIONS, torch.float32)
    texts = []
    for first in (plain, session):
        second, third = first.another(), first.another()
        found = answers([first, second], 6, {})
        tokens = [third.prefill_choose(IDS[30:50], Choice()), *(text[-1] for text in found)]
        for _ in range(6):
            tokens = first.step_many([third, first, second], tokens, [Choice()] * 3)  # type: ignore[assignment]
            found.append(list(tokens))
        texts.append(found)
    assert texts[0] == texts[1]
    assert steps == 3 * ["run"] + 4 * ["run_on"] + 3 * ["run"] + 4 * ["run_on"]
