"""The streamed reference against the whole model in memory."""

import numpy as np
import pytest
import torch

from benchmarks.fidelity import reference
from benchmarks.fidelity.reference import ReferenceHead, ReferenceScorer, hidden_states
from fox_edge.errors import CheckpointError, ContextOverflowError, FoxEdgeError
from runtimes.base import SCORE_CHUNK
from tests.benchmarks.conftest import make_checkpoint


def tokens(count: int, vocab_size: int = 8192) -> list[int]:
    return np.random.default_rng(2).integers(0, vocab_size, count).tolist()


def whole(checkpoint, ids) -> np.ndarray:
    with torch.inference_mode():
        return checkpoint.load_model(torch.float32)(torch.tensor([ids]))[0].numpy()


@pytest.mark.parametrize("count", [1, 2, SCORE_CHUNK, 3 * SCORE_CHUNK + 7])
def test_streamed_logits_equal_the_whole_model_s(checkpoint, count):
    ids = tokens(count)
    chunks = list(ReferenceScorer(checkpoint).logits(ids))
    assert all(len(c) <= SCORE_CHUNK and c.dtype == np.float32 for c in chunks)
    assert np.abs(np.concatenate(chunks) - whole(checkpoint, ids)).max() < 1e-5


def test_small_pieces_of_head_and_logits_change_nothing(checkpoint, monkeypatch):
    ids = tokens(150)
    expected = np.concatenate(list(ReferenceScorer(checkpoint).logits(ids)))
    monkeypatch.setattr(reference, "_HEAD_PIECE_BYTES", 1000 * 64 * 4)
    monkeypatch.setattr(reference, "_LOGITS_BYTES", 1)
    chunks = list(ReferenceScorer(checkpoint).logits(ids))
    # Every chunk is its own memory: the first must not be overwritten by a later pass over the head.
    assert [len(c) for c in chunks] == [SCORE_CHUNK, SCORE_CHUNK, 150 - 2 * SCORE_CHUNK]
    assert np.abs(np.concatenate(chunks) - expected).max() < 1e-5


def test_an_untied_model_uses_its_own_head(tmp_path):
    untied = make_checkpoint(tmp_path / "untied", tied=False)
    ids = tokens(20)
    rows = np.concatenate(list(ReferenceScorer(untied).logits(ids)))
    assert np.abs(rows - whole(untied, ids)).max() < 1e-5


def test_the_last_text_is_not_run_again(checkpoint, monkeypatch):
    scorer = ReferenceScorer(checkpoint)
    first = np.concatenate(list(scorer.logits(tokens(10))))
    read = []
    tensor = checkpoint.tensor
    monkeypatch.setattr(checkpoint, "tensor", lambda name: read.append(name) or tensor(name))
    again = np.concatenate(list(scorer.logits(tokens(10))))
    assert set(read) == {"model.embed_tokens.weight"}
    assert np.array_equal(first, again)
    other = np.concatenate(list(scorer.logits(tokens(11))))
    assert len(read) > 10
    assert np.abs(other[:10] - first).max() < 1e-5


def test_chunks_that_pass_are_the_same_in_one_buffer(checkpoint, monkeypatch):
    scorer, ids = ReferenceScorer(checkpoint), tokens(150)
    kept = np.concatenate(list(scorer.logits(ids)))
    passing = np.concatenate([chunk.copy() for chunk in scorer.passing_logits(ids)])
    assert np.array_equal(kept, passing)
    monkeypatch.setattr(reference, "_LOGITS_BYTES", 1)
    assert len({chunk.ctypes.data for chunk in scorer.passing_logits(ids)}) == 1


def test_windows_in_any_groups_are_each_a_text_of_its_own(checkpoint, monkeypatch):
    windows, told = [tokens(40)[n:] + tokens(n) for n in range(5)], []
    at_once = torch.cat(list(hidden_states(checkpoint, windows, 10)))
    assert at_once.shape == (5, 30, 64)
    # Two windows of 40 tokens, each 4 * (2 * 96 + 4 * 64) bytes: groups of 2, 2 and 1.
    monkeypatch.setattr(reference, "_ACTIVATION_BYTES", 2 * 40 * 4 * (2 * 96 + 4 * 64))
    groups = list(hidden_states(checkpoint, windows, 10, lambda *done: told.append(done)))
    assert [len(group) for group in groups] == [2, 2, 1]
    assert told == [(n, 9) for n in range(1, 10)]
    assert (torch.cat(groups) - at_once).abs().max() < 1e-5
    logits = np.concatenate([chunk.copy() for chunk in ReferenceHead(checkpoint).logits(at_once[3].numpy())])
    assert np.abs(logits - whole(checkpoint, windows[3])[10:]).max() < 1e-5


def test_texts_that_cannot_be_scored_are_refused(checkpoint):
    with pytest.raises(ContextOverflowError, match="513 tokens do not fit the model's 512"):
        next(ReferenceScorer(checkpoint).logits([1] * 513))
    for bad in ([], [8192], [-1]):
        with pytest.raises(FoxEdgeError, match="0 to 8191"):
            next(ReferenceScorer(checkpoint).logits(bad))


def test_a_head_that_is_no_number_is_named(checkpoint, tmp_path):
    folder = tmp_path / "damaged"
    damaged = make_checkpoint(folder)
    hidden = torch.cat(list(hidden_states(damaged, [[1, 2]])))[0].numpy()
    data = bytearray((folder / "model.safetensors").read_bytes())
    row = damaged.tensor("model.embed_tokens.weight")[4321].view(torch.uint8).numpy().tobytes()
    at = data.index(row)
    data[at : at + 2] = b"\xc0\x7f"
    (folder / "model.safetensors").write_bytes(bytes(data))
    head = ReferenceHead(type(damaged).open(folder))
    with pytest.raises(
        CheckpointError, match=r"'model\.embed_tokens\.weight' holds nan at row 4321, column 0"
    ):
        next(head.logits(hidden))


def test_a_weight_that_is_no_number_is_named(tmp_path):
    damaged = make_checkpoint(tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xc0\x7f"  # a bfloat16 NaN, in the last tensor of the file
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        next(ReferenceScorer(type(damaged).open(tmp_path / "damaged")).logits([1, 2]))
