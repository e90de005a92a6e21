"""Guessing ahead gives the logits of plain steps and the text of plain decoding, and stops where it loses."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from export.gguf import export_gguf
from export.onnx import export_onnx
from fox_edge import cli
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ContextOverflowError
from fox_edge.nano.problems import held_out
from fox_edge.quant import GGUF, ONNX, find_recipe
from fox_edge.tokenizer import Tokenizer
from runtimes.base import Logits, Session, SessionOptions, open_session
from runtimes.generate import generate
from runtimes.lookup import GUARD, LONGEST, History, LookupSession, Worth, _leads, speculating
from runtimes.sampling import Sampling
from runtimes.torch import TorchSession

VOCAB = 8


class Exact:
    """A model whose logits depend on all tokens and on nothing else; time passes with every run."""

    vocab_size = VOCAB

    def __init__(self, context: int = 200, step_s: float = 1.0, batch_s: float = 1.2) -> None:
        self.context, self.held = context, list[int]()
        self.now, self.step_s, self.batch_s = 0.0, step_s, batch_s
        self.batches = 0

    @property
    def length(self) -> int:
        return len(self.held)

    def clock(self) -> float:
        return self.now

    def logits(self) -> Logits:
        # A walk through few states, so that it repeats itself.
        seed = hash(tuple(self.held[-2:])) % 1000
        return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32)

    def _append(self, token: int) -> Logits:
        if len(self.held) >= self.context:
            raise ContextOverflowError("full")
        self.held.append(int(token))
        return self.logits()

    def prefill(self, tokens: Sequence[int]) -> Logits:
        return [self._append(token) for token in tokens][-1]

    def step(self, token: int) -> Logits:
        self.now += self.step_s
        return self._append(token)

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        self.now += self.batch_s
        self.batches += 1
        yield np.stack([self._append(token) for token in tokens][start:])

    def truncate(self, length: int) -> None:
        del self.held[length:]

    def reset(self) -> None:
        self.truncate(0)

    def close(self) -> None:
        pass


class Rounding(Exact):
    """The same, but a batch leaves traces in the cache: logits after it are off by up to `noise` spreads."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise, self.dirty = noise, list[bool]()

    def logits(self) -> Logits:
        exact = super().logits()
        dirty = sum(self.dirty[: len(self.held)])
        if not dirty:
            return exact
        rng = np.random.default_rng(len(self.held) + 1000 * dirty)
        moved = rng.uniform(-0.5, 0.5, size=VOCAB) * self.noise * exact.std()
        return (exact + moved).astype(np.float32)

    def _append(self, token: int, dirty: bool = False) -> Logits:
        self.dirty[len(self.held) :] = [dirty]
        return super()._append(token)

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        self.batches += 1
        yield np.stack([self._append(token, dirty=True) for token in tokens][start:])


def test_history_guesses_what_followed_the_longest_and_latest_match() -> None:
    history = History()
    history.append([1, 2, 3, 9, 9, 5, 2, 3, 7, 7, 1, 2, 3])
    assert history.guess(2) == (3, [9, 9])  # 1 2 3 beats the later 2 3
    history.append([4])
    assert history.guess(2) == (0, [])
    history.append([2, 3])
    assert history.guess(3) == (2, [4, 2, 3])
    assert History().guess(4) == (0, [])


def test_history_forgets_exactly() -> None:
    tokens = [random.Random(1).randrange(4) for _ in range(200)]
    whole, cut = History(), History()
    cut.append(tokens)
    for length in (150, 90, 3, 0):
        cut.truncate(length)
        whole = History()
        whole.append(tokens[:length])
        assert cut.tokens == whole.tokens
        assert {k: v for k, v in cut._after.items() if v} == whole._after
    assert whole.guess(3) == (0, [])


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_every_use_gives_the_logits_of_the_session_below(seed: int, adaptive: bool) -> None:
    rng, plain, below = random.Random(seed), Exact(), Exact()
    session = LookupSession(below, most=5, adaptive=adaptive, clock=below.clock)
    logits = plain.prefill([1, 2, 3, 1, 2])
    np.testing.assert_array_equal(session.prefill([1, 2, 3, 1, 2]), logits)
    for _ in range(300):
        action = rng.random()
        if action < 0.9 and plain.length < plain.context:
            # Mostly the likeliest token, sometimes another.
            token = int(logits.argmax()) if rng.random() < 0.9 else rng.randrange(VOCAB)
            logits = plain.step(token)
            np.testing.assert_array_equal(session.step(token), logits)
        elif action < 0.95:
            length = rng.randrange(1, plain.length + 1)
            plain.truncate(length)
            session.truncate(length)
            logits = plain.logits()
        elif plain.length + 3 <= plain.context:
            rows = np.concatenate(list(plain.score([4, 5, 6])))
            np.testing.assert_array_equal(np.concatenate(list(session.score([4, 5, 6]))), rows)
            logits = rows[-1]
        assert session.length == plain.length
        assert below.held[: session.length] == plain.held
    assert adaptive or session.counts.right > 20


def text(session: Session, prompt: Sequence[int], count: int = 150) -> list[int]:
    session.reset()
    return list(generate(session, prompt, max_tokens=count))


def test_text_that_repeats_takes_fewer_runs_and_is_the_same() -> None:
    plain, below = Exact(), Exact()
    session = LookupSession(below, clock=below.clock)
    expected = text(plain, [1, 2])
    assert text(session, [1, 2]) == expected
    assert below.now < 0.6 * plain.now
    assert session.counts.steps == session.counts.singles + session.counts.batches + session.counts.right


def test_where_batches_cost_too_much_it_stops() -> None:
    plain, below = Exact(), Exact(batch_s=9.5)
    session = LookupSession(below, clock=below.clock)
    for n in range(20):
        assert text(session, [1, n % VOCAB]) == text(plain, [1, n % VOCAB])
    assert below.batches < 8
    assert below.now < 1.03 * plain.now


def test_steps_too_short_to_gain_from_are_left_alone() -> None:
    plain, below = Exact(step_s=0.001), Exact(step_s=0.001, batch_s=0.001)
    session = LookupSession(below, clock=below.clock)
    for n in range(5):  # a text that repeats, cut and begun anew in between
        assert text(session, [1, n % VOCAB]) == text(plain, [1, n % VOCAB])
    batches = below.batches
    assert text(session, [3, 4]) == text(plain, [3, 4])
    assert below.batches == batches and below.held == plain.held and session.length == plain.length
    # Who asks for guesses gets them all the same.
    always = LookupSession(Exact(step_s=0.001, batch_s=0.001), adaptive=False)
    text(always, [1, 2])
    assert always.counts.batches > 10


def test_where_guesses_are_wrong_nothing_is_run() -> None:
    below = Exact(batch_s=1.2)
    session = LookupSession(below, clock=below.clock)
    session.prefill([0])
    rng = random.Random(0)
    for _ in range(199):
        session.step(rng.randrange(VOCAB))
    assert session.counts.batches < 5


@pytest.mark.parametrize("seed", range(20))
def test_rounding_below_the_guard_changes_no_text(seed: int) -> None:
    prompt = [seed % VOCAB, seed // VOCAB]
    plain, below = Exact(), Rounding(GUARD)
    session = LookupSession(below, most=6, adaptive=False)
    assert text(session, prompt) == text(plain, prompt)
    assert session.counts.right > 50


def test_rounding_would_change_text_without_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr("runtimes.lookup._leads", lambda _: True)
    changed = 0
    for seed in range(20):
        prompt = [seed % VOCAB, seed // VOCAB]
        session = LookupSession(Rounding(8 * GUARD), most=6, adaptive=False)
        changed += text(session, prompt) != text(Exact(), prompt)
    assert changed > 0


def test_leads() -> None:
    row = np.zeros(1000, np.float32)
    row[:500] = 2  # a spread of one
    for at in (0, 500, 999):
        near = row.copy()
        near[at] = 2 + 0.9 * GUARD
        assert not _leads(near)
        near[at] = 2 + 1.1 * GUARD
        assert _leads(near)


def test_only_greedy_text_is_guessed() -> None:
    class Anything:
        def apply(self, logits: Logits) -> None: ...
        def accept(self, token: int) -> None: ...

    for sampling, constraint in (
        (Sampling(temperature=1.0, seed=1), None),
        (Sampling(repeat_penalty=1.3), None),
        (Sampling(), Anything()),
    ):
        session = LookupSession(Exact(), adaptive=False)
        plain = list(generate(Exact(), [1, 2], sampling, max_tokens=100, constraint=constraint))
        assert list(generate(session, [1, 2], sampling, max_tokens=100, constraint=constraint)) == plain
        assert session.counts.batches == 0
    session.reset()
    list(generate(session, [1, 2], max_tokens=100))
    assert session.counts.batches > 0


def test_a_full_context_is_refused_as_below_and_nothing_is_lost() -> None:
    session = LookupSession(Exact(context=40), adaptive=False)
    assert len(text(session, [1, 2], 100)) == len(text(Exact(context=40), [1, 2], 100))
    assert session.length == 40
    with pytest.raises(ContextOverflowError):
        session.step(1)
    assert session.length == 40


def test_a_worth_that_knows_nothing_guesses_nothing() -> None:
    worth = Worth()
    assert worth.size(LONGEST, 8) == 0
    worth.stepped(1.0)
    assert worth.size(LONGEST, 8) == 0
    worth.guessed(LONGEST, 5)
    assert worth.size(LONGEST, 8) == 8
    worth.batched(8, 5.9, 5)  # six tokens for 5.9 steps: less than a tenth is saved
    assert worth.size(LONGEST, 8) == 0


def test_promises_that_were_not_kept_raise_what_is_asked() -> None:
    worth = Worth()
    worth.stepped(1.0)
    worth.guessed(LONGEST, 3)
    worth.batched(8, 3.0, 3)
    assert worth.size(LONGEST, 8) == 8  # four steps for three
    worth.batched(8, 3.0, 0)
    worth.batched(8, 3.0, 0)
    worth.guessed(LONGEST, 3)
    assert worth.size(LONGEST, 8) == 0
    for _ in range(10):
        worth.batched(8, 3.0, 8)
    assert worth.size(LONGEST, 8) == 8


def test_options_say_which_session() -> None:
    below = Exact()
    assert speculating(below, SessionOptions()) is below
    auto, fixed = (speculating(below, SessionOptions(speculate=choice)) for choice in ("auto", 3))
    assert isinstance(auto, LookupSession) and auto._adaptive
    assert isinstance(fixed, LookupSession) and (fixed._most, fixed._adaptive) == (3, False)


# --- the real runtimes, on the embedded model ------------------------------------------------------------


@pytest.fixture(scope="module")
def artifacts(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("lookup")
    return {
        GGUF: export_gguf(nano, folder / "gguf", find_recipe(GGUF, "int4"), rounding="nearest"),
        ONNX: export_onnx(nano, folder / "onnx", find_recipe(ONNX, "int4"), rounding="nearest"),
    }


@pytest.mark.parametrize("runtime", [GGUF, ONNX, "torch"])
def test_the_same_text_from_every_runtime(
    runtime: str, nano: Checkpoint, artifacts: dict[str, Artifact]
) -> None:
    options = SessionOptions(context=512, threads=1, cache=False)
    session = TorchSession(nano, options) if runtime == "torch" else open_session(artifacts[runtime], options)
    tokenizer = Tokenizer.from_folder(nano.path)
    prompts = []
    for problem in held_out(3 if runtime == "torch" else 8):
        again = f"{problem.question} {problem.answer}"
        prompts.append(tokenizer.encode_chat([{"role": "user", "content": problem.question}]))
        prompts.append(tokenizer.encode(f"{again}\n{again}\n{problem.question}", bos=True))
    with contextlib.closing(session):
        guessing = LookupSession(session, adaptive=False)
        for prompt in prompts:
            expected = text(session, prompt, 40)
            assert text(guessing, prompt, 40) == expected
    assert guessing.counts.right > 20 and guessing.counts.batches > 20


def test_chat_answers_the_same(
    artifacts: dict[str, Artifact], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    question = held_out(1)[0].question
    said = []
    for choice in ("off", "auto", "4"):
        words = ["--speculate", choice, "--threads", "1", "--no-cache", "--max-tokens", "60"]
        assert cli.main(["chat", str(artifacts[GGUF].path), *words, question]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] and said[0] == said[1] == said[2]


@pytest.mark.parametrize("word", ["0", "-1", "some"])
def test_mistakes(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["chat", "x", "--speculate", word])
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
