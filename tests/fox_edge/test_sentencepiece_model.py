"""The fields of tokenizer.model against sentencepiece's own reading."""

from __future__ import annotations

import pytest
import sentencepiece

from fox_edge.sentencepiece_model import SentencePieceModel, with_kinds
from tests.helpers import PROBES, sentencepiece_bytes


@pytest.mark.parametrize("gemma_like", [True, False])
@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_model_file_fields_are_sentencepieces(gemma_like: bool, algorithm: str) -> None:
    data = sentencepiece_bytes(gemma_like, algorithm=algorithm)
    ours = SentencePieceModel.parse(data, "x")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ids = list(range(theirs.vocab_size()))
    assert ours.algorithm == algorithm and ours.byte_fallback
    assert [p.text for p in ours.pieces] == [theirs.id_to_piece(i) for i in ids]
    assert [p.score for p in ours.pieces] == [theirs.get_score(i) for i in ids]
    for kind, test in (
        ("control", theirs.is_control),
        ("unknown", theirs.is_unknown),
        ("byte", theirs.is_byte),
    ):
        assert [p.kind == kind for p in ours.pieces] == [test(i) for i in ids]
    their_ids = (theirs.unk_id(), theirs.bos_id(), theirs.eos_id(), theirs.pad_id())
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == their_ids
    assert ours.add_dummy_prefix != gemma_like and not ours.remove_extra_whitespaces


def test_model_file_round_trip() -> None:
    data = sentencepiece_bytes()
    model = SentencePieceModel.parse(data, "x")
    again = SentencePieceModel.parse(model.to_bytes(), "y")
    assert again == model
    rewritten = sentencepiece.SentencePieceProcessor(model_proto=model.to_bytes())
    original = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in PROBES:
        assert rewritten.encode(text) == original.encode(text)


def test_changing_kinds_changes_nothing_else() -> None:
    data = sentencepiece_bytes()
    changed = with_kinds(data, {6: "control"})
    before, after = SentencePieceModel.parse(data, "x"), SentencePieceModel.parse(changed, "x")
    assert after.pieces[6].kind == "control" and before.pieces[6].kind == "user_defined"
    after.pieces[6] = before.pieces[6]
    assert after == before
    assert with_kinds(changed, {6: "user_defined"}) == data
