"""The two kinds of tokenizer file behind one small interface: SentencePiece's and tokenizers' JSON.

A backend lists pieces and encodes text; it knows nothing of chat, of stop tokens, or of which special
token plays which role beyond what its own file says.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from fox_edge.errors import TokenizerError
from fox_edge.sentencepiece_model import SentencePieceModel, with_kinds
from fox_edge.vocabulary import Piece, Vocabulary

MAX_TOKENIZER_BYTES = 256 << 20
# A token added far past the end of the vocabulary would make a list of fillers as long as its id.
_MAX_ADDED = 1 << 16
_SPACE = "\u2581"
_SPACE_UTF8 = _SPACE.encode("utf-8")

# Text -> (id where the files give one, whether it is special).
Added = Mapping[str, tuple[int | None, bool]]


class Backend(Protocol):
    """What Tokenizer needs of a tokenizer file."""

    pieces: Vocabulary
    add_space_prefix: bool
    adds_bos: bool
    algorithm: str
    special_ids: dict[str, int | None]
    notes: list[str]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: control tokens written in it are ordinary characters."""
        ...

    def piece_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that a token adds to the text."""
        ...


class SentencePieceBackend:
    """A tokenizer.model, and the tokens that the JSON files add to it or declare to be special."""

    algorithm: str
    adds_bos = True

    def __init__(self, path: Path, added: Added) -> None:
        data = _read(path)
        model = SentencePieceModel.parse(data, str(path))
        if model.algorithm not in ("bpe", "unigram"):
            raise TokenizerError(
                f"{path}: a SentencePiece '{model.algorithm}' model, but bpe or unigram is due"
            )
        if not model.escape_whitespaces:
            raise TokenizerError(f"{path}: does not write spaces as U+2581, which no runtime expects")
        self.algorithm, self.add_space_prefix = model.algorithm, model.add_dummy_prefix
        self.notes = []
        if model.charsmap_bytes:
            self.notes.append(f"{path.name} normalizes text before encoding it, which llama.cpp does not")
        pieces, changed = _with_added(path, model.pieces, added)
        count = len(model.pieces)
        self._added = {p.text: count + n for n, p in enumerate(pieces[count:]) if p.kind == "user_defined"}
        self.pieces = Vocabulary(pieces)
        self._splitter = splitter(self._added)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(
                model_proto=with_kinds(data, changed) if changed else data
            )
        except RuntimeError as error:
            raise TokenizerError(f"{path}: sentencepiece cannot open it ({error})") from None
        own = {"bos": model.bos_id, "eos": model.eos_id, "pad": model.pad_id, "unk": model.unk_id}
        self.special_ids: dict[str, int | None] = {
            role: id if 0 <= id < count else None for role, id in own.items()
        }

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; raises TokenizerError where the vocabulary cannot express it."""
        if self._splitter is None:
            return self._encode(text)
        ids: list[int] = []
        for part in self._splitter.split(text):
            ids += [self._added[part]] if part in self._added else self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        # A lone surrogate cannot be written in UTF-8; the rest of the text should not be lost for it.
        clean = text.encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = self._processor.encode(clean) if clean else []
        return ids

    def piece_bytes(self, id: int) -> bytes:
        """UTF-8 of a piece, U+2581 being a space; one byte of a byte piece."""
        return _spm_bytes(self.pieces, id)


class JsonBackend:
    """A tokenizer.json of the tokenizers library, with a BPE model."""

    def __init__(self, path: Path, added: Added) -> None:
        data = _read(path)
        try:
            fields = json.loads(data)
            model = fields["model"]
            vocab, merges = model["vocab"], model.get("merges") or []
            kind = model.get("type", "BPE")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TokenizerError(f"{path}: not readable as a tokenizers JSON file") from None
        if kind != "BPE" or not isinstance(vocab, dict):
            raise TokenizerError(f"{path}: a '{kind}' tokenizer, but a BPE with a vocabulary is due")
        self.notes: list[str] = []
        self.special_ids: dict[str, int | None] = {}
        byte_level = "ByteLevel" in json.dumps([fields.get("pre_tokenizer"), fields.get("decoder")])
        self.algorithm = "byte-level-bpe" if byte_level else "bpe"
        self.add_space_prefix = not byte_level and _json_space_prefix(fields)
        declared = _json_added(path, fields, added)
        pieces, _ = _with_added(path, _json_pieces(path, vocab, merges, byte_level), declared)
        own = {token["content"] for token in fields.get("added_tokens") or []}
        pieces = [
            replace(p, kind="user_defined") if p.text in own and p.kind == "normal" else p for p in pieces
        ]
        unk = model.get("unk_token")
        if isinstance(unk, str) and unk in vocab:
            id = self.special_ids["unk"] = vocab[unk]
            pieces[id] = Piece(unk, pieces[id].score, "unknown")
        self.pieces, self._byte_level = Vocabulary(pieces), byte_level
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        # The library raises a bare Exception for whatever it dislikes.
        except Exception as error:
            raise TokenizerError(f"{path}: tokenizers cannot open it ({error})") from None
        # No truncation or padding that was saved with it, and control tokens in plain text are characters.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._lock = threading.Lock()
        self._tokenizer.add_special_tokens(
            [
                tokenizers.AddedToken(text, special=True, normalized=False)
                for text in map(self.pieces.text, self.pieces.of_kinds(["control"]))
                if self._tokenizer.token_to_id(text) is not None
            ]
        )
        with_bos: list[int] = self._tokenizer.encode("a").ids
        self.adds_bos = bool(with_bos) and self.pieces.kind(with_bos[0]) == "control"
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        with self._lock:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def piece_bytes(self, id: int) -> bytes:
        """UTF-8 of a piece; bytes for byte pieces and byte-level alphabets."""
        if self._byte_level and self.pieces.kind(id) == "normal":
            return _byte_level_bytes(self.pieces.text(id))
        return _spm_bytes(self.pieces, id)


def splitter(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds the leftmost, longest of these texts and keeps it when splitting."""
    ordered = sorted((t for t in texts if t), key=lambda t: (-len(t), t))
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise TokenizerError(f"{path}: {size} bytes, but at most {MAX_TOKENIZER_BYTES} are read")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from None


def _with_added(path: Path, pieces: list[Piece], added: Added) -> tuple[list[Piece], dict[int, str]]:
    """The pieces with what the settings add or rename, and id -> kind of those whose kind changed."""
    out = list(pieces)
    ids = {piece.text: id for id, piece in enumerate(pieces)}
    changed: dict[int, str] = {}
    for text, (given, special) in added.items():
        id = ids.get(text) if given is None else given
        if id is None:
            continue  # declared, but in no vocabulary: whoever needs it will say so
        if not 0 <= id < len(pieces) + _MAX_ADDED:
            raise TokenizerError(
                f"{path}: added token '{text}' has id {id}, but there are {len(pieces)} pieces"
            )
        while len(out) <= id:
            out.append(Piece(f"<unused_{len(out)}>", 0.0, "unused"))
        if id >= len(pieces):
            out[id] = Piece(text, 0.0, "control" if special else "user_defined")
            continue
        old = pieces[id]
        if old.text != text and old.kind in ("byte", "unknown"):
            raise TokenizerError(f"{path}: added token '{text}' would rename piece {id}, '{old.text}'")
        if special and old.kind in ("normal", "user_defined", "unused"):
            changed[id] = "control"
        out[id] = Piece(text, old.score, changed.get(id, old.kind))
    return out, changed


def _spm_bytes(pieces: Vocabulary, id: int) -> bytes:
    text = pieces.utf8(id)
    if pieces.kind(id) == "byte":
        return bytes([int(text[3:-1], 16)])
    return text.replace(_SPACE_UTF8, b" ")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: itself where printable, else the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(text: str) -> bytes:
    if all(char in _ALPHABET for char in text):
        return bytes(_ALPHABET[char] for char in text)
    return text.encode("utf-8", "replace")


def _json_space_prefix(fields: dict[str, Any]) -> bool:
    """Whether the file puts a space before text: a Prepend normalizer, or Metaspace's prepend_scheme."""
    normalizer, pre = fields.get("normalizer"), fields.get("pre_tokenizer")
    steps: list[Any] = [normalizer, pre]
    for step, key in ((normalizer, "normalizers"), (pre, "pretokenizers")):
        if isinstance(step, dict) and isinstance(step.get(key), list):
            steps += step[key]
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "Prepend" and step.get("prepend") == _SPACE:
            return True
        if kind == "Metaspace":
            # Files of older versions say it with a boolean.
            return bool(
                step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
                != "never"
            )
    return False


def _json_added(path: Path, fields: dict[str, Any], added: Added) -> dict[str, tuple[int | None, bool]]:
    """The file's own added tokens, and what the settings say of special ones."""
    out: dict[str, tuple[int | None, bool]] = {}
    for token in fields.get("added_tokens") or []:
        try:
            out[str(token["content"])] = (int(token["id"]), bool(token.get("special")))
        except (TypeError, KeyError, ValueError, AttributeError):
            raise TokenizerError(f"{path}: an entry of added_tokens has no id or content") from None
    for text, (id, special) in added.items():
        own = out.get(text, (id, False))
        out[text] = (own[0], own[1] or special)
    return out


def _json_pieces(path: Path, vocab: dict[str, Any], merges: list[Any], byte_level: bool) -> list[Piece]:
    """Pieces by id; the score of a merged piece is minus its first merge's rank, so earlier merges win."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            raise TokenizerError(f"{path}: merge {rank} is {str(merge)[:60]!r}, but two pieces are due")
        scores.setdefault(f"{pair[0]}{pair[1]}", -float(rank))
    # A piece that no merge makes must not be preferred to one that a merge does.
    unmerged = -float(len(merges) + 1)
    out: list[Piece | None] = [None] * len(vocab)
    for text, id in vocab.items():
        if type(id) is not int or not 0 <= id < len(out) + _MAX_ADDED:
            raise TokenizerError(f"{path}: piece '{text}' has id {id!r}, but there are {len(vocab)} pieces")
        out += [None] * (id + 1 - len(out))
        if (taken := out[id]) is not None:
            raise TokenizerError(f"{path}: pieces '{taken.text}' and '{text}' share id {id}")
        out[id] = Piece(
            text, scores.get(text, unmerged if len(text) > 1 else 0.0), _json_kind(text, byte_level)
        )
    return [piece or Piece(f"<unused_{id}>", 0.0, "unused") for id, piece in enumerate(out)]


def _json_kind(text: str, byte_level: bool) -> str:
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return "byte" if is_byte and not byte_level else "normal"
