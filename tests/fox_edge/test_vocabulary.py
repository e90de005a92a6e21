from __future__ import annotations

import random

import pytest

from fox_edge.vocabulary import KINDS, Piece, Vocabulary

PIECES = [
    Piece("<unk>", 0.0, "unknown"),
    Piece("<bos>", 0.0, "control"),
    Piece("<0x41>", 0.0, "byte"),
    Piece("\u2581the", -3.25, "normal"),
    Piece("the", -4.5, "normal"),
    Piece("", -1e9, "unused"),
    Piece("the", -5.0, "user_defined"),  # a text twice
    Piece("狐🦊", -16777217.0, "normal"),
    Piece("\ud83e", -6.0, "normal"),  # half a surrogate pair, as JSON can hold it
]


def test_what_goes_in_comes_out() -> None:
    vocabulary = Vocabulary(PIECES)
    assert len(vocabulary) == len(PIECES)
    assert list(vocabulary) == PIECES
    assert [vocabulary[id] for id in range(len(PIECES))] == PIECES
    assert [vocabulary.text(id) for id in range(len(PIECES))] == [p.text for p in PIECES]
    assert vocabulary.utf8(3) == b"\xe2\x96\x81the"


def test_find_is_exact_and_gives_the_lowest_id() -> None:
    vocabulary = Vocabulary(PIECES)
    for piece in PIECES:
        assert vocabulary.find(piece.text) == next(n for n, p in enumerate(PIECES) if p.text == piece.text)
    assert [vocabulary.find(text) for text in ("th", "he", "<unk><bos>", "\u2581", "🦊")] == [None] * 5


def test_an_empty_vocabulary() -> None:
    vocabulary = Vocabulary([])
    assert len(vocabulary) == 0 and list(vocabulary) == [] and vocabulary.find("a") is None
    assert vocabulary.of_kinds(KINDS) == []


def test_ids_by_kind() -> None:
    vocabulary = Vocabulary(PIECES)
    assert vocabulary.of_kinds(("control", "unknown")) == [0, 1]
    assert vocabulary.of_kinds(["normal"]) == [3, 4, 7, 8]
    assert vocabulary.of_kinds([]) == []
    assert all(vocabulary.kind(id) == piece.kind for id, piece in enumerate(PIECES))


@pytest.mark.parametrize("seed", range(3))
def test_as_a_dictionary_would_find(seed: int) -> None:
    rng = random.Random(seed)
    texts = ["".join(rng.choices("ab\u2581ÿ", k=rng.randrange(1, 5))) for _ in range(300)]
    vocabulary = Vocabulary([Piece(text, float(n), "normal") for n, text in enumerate(texts)])
    wanted: dict[str, int] = {}
    for n, text in enumerate(texts):
        wanted.setdefault(text, n)
    asked = texts + ["".join(rng.choices("ab\u2581ÿ", k=rng.randrange(1, 6))) for _ in range(300)]
    assert [vocabulary.find(text) for text in asked] == [wanted.get(text) for text in asked]
