"""The ExecuTorch session: the same logits however tokens arrive, against the reference on its own weights."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.fidelity.verify import limits_of, verify
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ContextOverflowError, FoxEdgeError, NotEnoughMemoryError
from fox_edge.quant import EMBEDDING
from runtimes import memory
from runtimes.base import SCORE_CHUNK, Session, SessionOptions, SharingSession, open_session
from runtimes.executorch.file import PteFile
from runtimes.executorch.session import PteSession
from runtimes.footprint import footprint
from tests.helpers import TINY

ROOT = Path(__file__).parents[3]
CONTEXT = TINY.max_positions
TOKENS = [int(t) for t in np.random.default_rng(5).integers(8, TINY.vocab_size, CONTEXT)]
# XNNPACK rounds activations to int8, so sums of another order may round another way.
ROUNDING = 0.08


def distance(got: Any, want: Any) -> float:
    """Root-mean-square of a difference over that of what is due."""
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def want(tiny_pte: Artifact, tiny: Checkpoint) -> np.ndarray:
    """The reference model's logits (T, V), in float32, with the weights that are in the file."""
    model = tiny.load_model(dtype=torch.float32)
    with contextlib.closing(PteFile(tiny_pte)) as file:
        state = {
            name: torch.from_numpy(file.rows(name, 0, _rows(file, name))) for name in file.tensor_names()
        }
    own = dict(model.named_parameters())
    names = {name: name if name in own else name.removeprefix("model.") for name in state}
    with torch.inference_mode():
        for name, value in state.items():
            own[names[name]].copy_(value.reshape(own[names[name]].shape))
        logits: np.ndarray = model(torch.tensor([TOKENS]))[0].numpy()
    return logits


def _rows(file: PteFile, name: str) -> int:
    return file._place(name).rows


@pytest.fixture
def session(tiny_pte: Artifact) -> Iterator[PteSession]:
    with contextlib.closing(PteSession(tiny_pte, SessionOptions(threads=1))) as opened:
        yield opened


def test_it_is_a_session(session: PteSession) -> None:
    assert isinstance(session, Session) and isinstance(session, SharingSession)
    assert (session.context, session.vocab_size, session.length) == (CONTEXT, TINY.vocab_size, 0)


def test_it_says_what_its_weights_say(session: PteSession, want: np.ndarray) -> None:
    """Positions, attention, head: each would be far off, not a rounding."""
    assert distance(session.prefill(TOKENS[:150]), want[149]) < ROUNDING
    rows = np.concatenate([session.step(token)[None] for token in TOKENS[150:160]])
    assert distance(rows, want[150:160]) < ROUNDING
    assert session.length == 160


def test_chunks_and_steps_agree(session: PteSession) -> None:
    whole = session.prefill(TOKENS[:180])
    for cuts in ([100, 80], [1] * 30 + [150], [128, 52]):
        session.reset()
        at = 0
        for size in cuts:
            got = session.prefill(TOKENS[at : at + size])
            at += size
        assert distance(got, whole) < ROUNDING


@pytest.mark.parametrize("start", [0, 1, 63, 150, 255, 256])
def test_score(start: int, session: PteSession, want: np.ndarray) -> None:
    chunks = list(session.score(TOKENS, start))
    assert all(len(chunk) <= SCORE_CHUNK for chunk in chunks)
    assert session.length == len(TOKENS)
    assert sum(map(len, chunks)) == len(TOKENS) - start
    if chunks:
        assert distance(np.concatenate(chunks), want[start:]) < ROUNDING


def test_prompts_steps_and_scores_go_on_in_one_cache(session: PteSession, want: np.ndarray) -> None:
    """Each method keeps what the other cached: loading one for the other must not lose it."""
    session.prefill(TOKENS[:50])
    rows = np.concatenate(list(session.score(TOKENS[50:90])))
    assert distance(rows, want[50:90]) < ROUNDING
    assert distance(session.prefill(TOKENS[90:140]), want[139]) < ROUNDING
    assert distance(session.step(TOKENS[140]), want[140]) < ROUNDING


def test_truncate_and_reset(session: PteSession) -> None:
    session.prefill(TOKENS[:100])
    once = session.prefill(TOKENS[100:150])
    session.prefill([1, 2, 3])
    session.truncate(100)
    np.testing.assert_array_equal(session.prefill(TOKENS[100:150]), once)
    session.truncate(500)
    assert session.length == 150
    session.reset()
    first = session.step(TOKENS[0])
    session.reset()
    np.testing.assert_array_equal(session.step(TOKENS[0]), first)


def test_logits_belong_to_the_caller(session: PteSession) -> None:
    first = session.step(TOKENS[0])
    rows = next(session.score(TOKENS[1:4]))
    kept = first.copy(), rows.copy()
    session.step(TOKENS[4])
    np.testing.assert_array_equal(first, kept[0])
    np.testing.assert_array_equal(rows, kept[1])


def test_conversations_take_turns_while_one_is_scored(session: PteSession) -> None:
    alone = np.concatenate(list(session.score(TOKENS[:64])))
    session.reset()
    other, chunks = session.another(), []
    for chunk in session.score(TOKENS[:64]):
        chunks.append(chunk)
        other.prefill(TOKENS[100:103])
    np.testing.assert_array_equal(np.concatenate(chunks), alone)
    other.close()


def test_a_prompt_longer_than_the_context(tiny_pte: Artifact, session: PteSession) -> None:
    session.prefill(TOKENS[: CONTEXT - 2])
    for attempt in (session.prefill, session.score):
        with pytest.raises(ContextOverflowError, match="254 tokens and 3 more do not fit a context of 256"):
            attempt(TOKENS[:3])
    session.prefill(TOKENS[:2])
    with pytest.raises(ContextOverflowError, match="256 tokens and 1 more"):
        session.step(0)
    for context in (0, 257):
        with pytest.raises(ContextOverflowError, match=f"{context} positions .* exported for 1 to 256"):
            PteSession(tiny_pte, SessionOptions(context=context))


def test_tokens_that_are_none(session: PteSession) -> None:
    with pytest.raises(FoxEdgeError, match="-1 to 5 are not all in a vocabulary of 512"):
        session.prefill([5, -1])
    with pytest.raises(FoxEdgeError, match="at least one token"):
        session.prefill([])
    assert session.length == 0


def test_choices_that_it_does_not_have(tiny_pte: Artifact) -> None:
    for options, said in (
        (SessionOptions(kv="int8"), "--kv int8: this .pte has float32"),
        (SessionOptions(device="cuda"), "computes on cpu"),
        (SessionOptions(accuracy_level=1), "no such choice"),
        (SessionOptions(repack=True), "no such choice"),
    ):
        with pytest.raises(FoxEdgeError, match=said):
            PteSession(tiny_pte, options)


def test_threads_are_the_process_s_and_said_so(tiny_pte: Artifact, session: PteSession) -> None:
    with pytest.raises(FoxEdgeError, match=r"2 threads were asked for, but another .* is open with 1"):
        PteSession(tiny_pte, SessionOptions(threads=2))
    first = session.prefill(TOKENS[:40])
    session.close()
    with contextlib.closing(PteSession(tiny_pte, SessionOptions(threads=2))) as two:
        assert distance(two.prefill(TOKENS[:40]), first) < ROUNDING


def test_a_closed_session_says_so(session: PteSession) -> None:
    session.close()
    session.close()
    with pytest.raises(FoxEdgeError, match="closed"):
        session.step(1)
    with pytest.raises(FoxEdgeError, match="closed"):
        session.another()


def test_memory_is_told_before_it_is_taken(tiny_pte: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is whole, however short the context: 2 x 2 layers x 1 head x 16 x 4 bytes x 256."""
    for context in (10, CONTEXT):
        found = footprint(str(tiny_pte.path), SessionOptions(context=context))
        assert (found["runtime"], found["kv"]) == ("executorch", "float32")
        assert found["kv_bytes"] == 2 * 2 * 16 * 4 * CONTEXT
    stored = sum(t.bytes for t in tiny_pte.manifest.tensors)
    # XNNPACK packs what is stored, and keeps two numbers beside each row.
    assert 0.9 * stored < found["weights_bytes"] < 1.2 * stored
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000_000)
    with pytest.raises(NotEnoughMemoryError, match=r"MB of KV cache .* 1 MB of memory are available"):
        open_session(tiny_pte)


def test_the_export_passes_verification(tiny_pte: Artifact, tiny: Checkpoint) -> None:
    report = verify(tiny_pte, tiny, limits_of(tiny_pte), text="the fox and the world " * 60)
    failed = {check["name"]: check["detail"] for check in report["checks"] if not check["passed"]}
    # A random model's logits are its own: what they are worth is held to nano's, elsewhere.
    assert failed.keys() <= {"logits", "greedy text"}
    names = [check["name"] for check in report["checks"]]
    assert {"tie", "tensors", "tokenizer", "phone tokenizer", "special tokens"} <= set(names)


def test_what_the_file_tells(tiny_pte: Artifact, tiny: Checkpoint) -> None:
    with contextlib.closing(PteFile(tiny_pte)) as file:
        assert file.stored(EMBEDDING) == ("q4s32", 512 * 64 // 2 + 512 * 2 * 2 + 64 * 4)
        rows = file.rows(EMBEDDING, 100, 140)
        want = tiny.float_rows(EMBEDDING, 100, 140).numpy()
        assert 0.02 < distance(rows, want) < 0.12
        np.testing.assert_array_equal(file.rows(EMBEDDING, 0, 512)[100:140], rows)
        assert "hold them once" in file.tie()
        with pytest.raises(ValueError, match="rows 500 to 513 of 512"):
            file.rows(EMBEDDING, 500, 513)


def test_opening_brings_nothing_of_the_exporter(tiny_pte: Artifact) -> None:
    """torchao and PyTorch's exporter take more than a hundred megabytes; the runtime needs neither."""
    program = (
        "import sys; from pathlib import Path; from fox_edge.artifact import Artifact;"
        "from runtimes.base import open_session;"
        f"open_session(Artifact.open(Path({str(tiny_pte.path)!r}))).prefill([5, 6]);"
        "raise SystemExit(any(n in sys.modules for n in ('torchao', 'executorch.exir', 'transformers')))"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
