"""A tokenizer of any larger size, made up from nano's: for rehearsing at a real shape without its files.

Gemma's ids for the special pieces, then nano's pieces, then made-up joins of two of them, which only apply
where nano's own merges leave something to join. Deterministic. Knows nothing of weights.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from fox_edge.errors import TokenizerError
from fox_edge.sentencepiece_model import SentencePieceModel, byte_pieces
from fox_edge.vocabulary import Piece

# Gemma's places: turns at 106 and 107, newlines from 108, spaces from 139, bytes from 217, text from 473.
_HEAD = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_TURNS_AT, _BYTES_AT = 106, 217
_LONGEST_RUN = 31
_SPACE = "\u2581"
_LEFT, _RIGHT = re.compile(f"{_SPACE}?[a-z]{{1,5}}"), re.compile("[a-z]{1,5}")


def stand_in_pieces(nano: list[Piece], size: int) -> list[Piece]:
    """`size` pieces by id. Raises TokenizerError when `size` is below nano's and the special ones."""
    normal = [piece for piece in nano if piece.kind == "normal"]
    pieces = _special_pieces()
    room = size - len(pieces) - len(normal)
    if room < 0:
        raise TokenizerError(
            f"a stand-in tokenizer has at least {len(pieces) + len(normal)} pieces, but {size} were asked for"
        )
    pieces += normal
    pieces += _joins(normal, room, {piece.text for piece in pieces})
    return pieces


def _special_pieces() -> list[Piece]:
    """Ids 0 to 472."""
    pieces = [Piece(text, 0.0, "unknown" if text == "<unk>" else "control") for text in _HEAD]
    unused = (Piece(f"<unused{n}>", 0.0, "control") for n in range(_BYTES_AT))
    pieces += [next(unused) for _ in range(_TURNS_AT - len(pieces))]
    pieces += [Piece(text, 0.0, "control") for text in ("<start_of_turn>", "<end_of_turn>")]
    pieces += [Piece("\n" * n, 0.0, "user_defined") for n in range(1, _LONGEST_RUN + 1)]
    pieces += [Piece(_SPACE * n, 0.0, "user_defined") for n in range(2, _LONGEST_RUN + 1)]
    pieces += [next(unused) for _ in range(_BYTES_AT - len(pieces))]
    return pieces + list(byte_pieces())


def _joins(normal: list[Piece], count: int, taken: set[str]) -> list[Piece]:
    """`count` new pieces, each of two short lower-case ones; their scores fall below all of nano's."""
    left = [p.text for p in normal if _LEFT.fullmatch(p.text)]
    right = [p.text for p in normal if _RIGHT.fullmatch(p.text)]
    if count > len(left) * len(right) // 4:
        raise TokenizerError(f"{count} made-up pieces are more than nano's vocabulary gives")
    # random() is the one method whose sequence Python promises to keep.
    draw = random.Random(0).random
    score = min(piece.score for piece in normal)
    joins: list[Piece] = []
    while len(joins) < count:
        text = left[int(draw() * len(left))] + right[int(draw() * len(right))]
        if text not in taken:
            taken.add(text)
            score -= 1.0
            joins.append(Piece(text, score, "normal"))
    return joins


def sentencepiece_file(pieces: list[Piece]) -> bytes:
    """tokenizer.model: a BPE with byte fallback and Gemma's special ids."""
    return SentencePieceModel(
        pieces,
        algorithm="bpe",
        byte_fallback=True,
        unk_id=3,
        bos_id=2,
        eos_id=1,
        pad_id=0,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    ).to_bytes()


def tokenizers_file(pieces: list[Piece], nano_json: dict[str, Any]) -> str:
    """The same vocabulary as tokenizer.json, with the settings around it taken from nano's."""
    added = [
        {
            "id": id,
            "content": piece.text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            # Runs of spaces are matched after the normalizer has written them with U+2581.
            "normalized": piece.text.startswith(_SPACE),
            "special": piece.kind != "user_defined",
        }
        for id, piece in enumerate(pieces)
        if piece.kind in ("control", "unknown", "user_defined")
    ]
    vocab = {piece.text: id for id, piece in enumerate(pieces)}
    model = {**nano_json["model"], "vocab": vocab, "merges": _merges(pieces)}
    fields = {**nano_json, "added_tokens": added, "model": model}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def _merges(pieces: list[Piece]) -> list[str]:
    """Every way to make a piece from two others, best score first."""
    normal = {piece.text: id for id, piece in enumerate(pieces) if piece.kind == "normal"}
    ranked = sorted(normal.items(), key=lambda item: (-pieces[item[1]].score, item[1]))
    return [
        f"{text[:cut]} {text[cut:]}"
        for text, _ in ranked
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]


def stand_in_files(nano: Path, size: int) -> dict[str, bytes]:
    """The tokenizer files of a stand-in of `size` pieces, by name; `nano` is the embedded model's folder."""
    model = SentencePieceModel.parse((nano / "tokenizer.model").read_bytes(), str(nano / "tokenizer.model"))
    pieces = stand_in_pieces(model.pieces, size)
    nano_json = json.loads((nano / "tokenizer.json").read_text(encoding="utf-8"))
    return {
        "tokenizer.model": sentencepiece_file(pieces),
        "tokenizer.json": tokenizers_file(pieces, nano_json).encode(),
        "tokenizer_config.json": (nano / "tokenizer_config.json").read_bytes(),
        "special_tokens_map.json": (nano / "special_tokens_map.json").read_bytes(),
    }
