"""SentencePiece's model file, read and written at the level of its fields.

The file is a protocol buffer (`sentencepiece_model.proto`); only the fields that an export needs are
understood, the rest is carried along untouched. Knows nothing of special tokens' meanings or of encoding
text: that is the sentencepiece library's job. No protobuf package is needed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fox_edge.errors import TokenizerError
from fox_edge.vocabulary import KINDS, Piece

# The enum SentencePiece.Type of sentencepiece_model.proto.
_KINDS = {number: kind for number, kind in enumerate(KINDS, 1)}
KIND_NUMBERS = {kind: number for number, kind in _KINDS.items()}
# The enum TrainerSpec.ModelType.
ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Field numbers of ModelProto, SentencePiece, TrainerSpec and NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 40, 41, 42, 43
# A piece as sentencepiece writes it, which is quicker to read than field by field: a text of less than 128
# bytes, a score, and a kind unless that is the usual one.
_USUAL_PIECE = re.compile(rb"\x0a([\x00-\x7f])(.*)\x15(.{4})(\x18[\x01-\x06])?", re.DOTALL)
_FLOAT = struct.Struct("<f")
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5


@dataclass
class SentencePieceModel:
    """The fields of a tokenizer.model that matter here. Defaults are the format's own."""

    pieces: list[Piece]
    algorithm: str = "unigram"
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    charsmap_bytes: int = 0  # size of the compiled text normalization; 0: text is taken as it is

    @classmethod
    def parse(cls, data: bytes, where: str) -> SentencePieceModel:
        """Read a tokenizer.model's bytes; raises TokenizerError naming `where`."""
        try:
            return cls._parse(data)
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise TokenizerError(f"{where}: not a SentencePiece model ({error})") from None

    @classmethod
    def _parse(cls, data: bytes) -> SentencePieceModel:
        model = cls(pieces=[])
        for number, _, value in _fields(data):
            if number == _PIECES:
                model.pieces.append(_parse_piece(value))
            elif number == _TRAINER:
                model._read_trainer({n: v for n, _, v in _fields(value)})
            elif number == _NORMALIZER:
                model._read_normalizer({n: v for n, _, v in _fields(value)})
        if not model.pieces:
            raise ValueError("it holds no pieces")
        return model

    def _read_trainer(self, spec: dict[int, int | bytes]) -> None:
        self.algorithm = ALGORITHMS[int(spec.get(_MODEL_TYPE, 1))]
        self.byte_fallback = bool(spec.get(_BYTE_FALLBACK, 0))
        self.unk_id = _signed(spec.get(_UNK_ID, 0))
        self.bos_id = _signed(spec.get(_BOS_ID, 1))
        self.eos_id = _signed(spec.get(_EOS_ID, 2))
        self.pad_id = _signed(spec.get(_PAD_ID, 2**64 - 1))

    def _read_normalizer(self, spec: dict[int, int | bytes]) -> None:
        charsmap = spec.get(_CHARSMAP, b"")
        self.charsmap_bytes = len(charsmap) if isinstance(charsmap, bytes) else 0
        self.add_dummy_prefix = bool(spec.get(_DUMMY_PREFIX, 1))
        self.remove_extra_whitespaces = bool(spec.get(_REMOVE_SPACES, 1))
        self.escape_whitespaces = bool(spec.get(_ESCAPE_SPACES, 1))

    def to_bytes(self) -> bytes:
        """A tokenizer.model that sentencepiece opens; it has no text normalization."""
        out = [_bytes_field(_PIECES, _piece_bytes(piece)) for piece in self.pieces]
        trainer = [
            _varint_field(_MODEL_TYPE, {v: k for k, v in ALGORITHMS.items()}[self.algorithm]),
            _varint_field(_VOCAB_SIZE, len(self.pieces)),
            _varint_field(_BYTE_FALLBACK, int(self.byte_fallback)),
            _varint_field(_UNK_ID, self.unk_id),
            _varint_field(_BOS_ID, self.bos_id),
            _varint_field(_EOS_ID, self.eos_id),
            _varint_field(_PAD_ID, self.pad_id),
        ]
        normalizer = [
            _bytes_field(_NAME, b"identity"),
            _bytes_field(_CHARSMAP, b""),
            _varint_field(_DUMMY_PREFIX, int(self.add_dummy_prefix)),
            _varint_field(_REMOVE_SPACES, int(self.remove_extra_whitespaces)),
            _varint_field(_ESCAPE_SPACES, int(self.escape_whitespaces)),
        ]
        out.append(_bytes_field(_TRAINER, b"".join(trainer)))
        out.append(_bytes_field(_NORMALIZER, b"".join(normalizer)))
        return b"".join(out)


def with_kinds(data: bytes, kinds: dict[int, str]) -> bytes:
    """The same model file with the kind of some pieces (id -> kind) changed; everything else is untouched."""
    out: list[bytes] = []
    copied = index = 0
    for start, stop, number, value in _spans(data):
        if number != _PIECES:
            continue
        if index in kinds:
            piece = _parse_piece(value)
            out += [data[copied:start], _bytes_field(_PIECES, _piece_bytes(_of_kind(piece, kinds[index])))]
            copied = stop
        index += 1
    out.append(data[copied:])
    return b"".join(out)


def _of_kind(piece: Piece, kind: str) -> Piece:
    return Piece(piece.text, piece.score, kind)


def _parse_piece(data: int | bytes) -> Piece:
    if isinstance(data, bytes) and (usual := _USUAL_PIECE.fullmatch(data)) and usual[1][0] == len(usual[2]):
        (score,) = _FLOAT.unpack(usual[3])
        return Piece(usual[2].decode("utf-8"), score, _KINDS[usual[4][1] if usual[4] else 1])
    text, score, kind = "", 0.0, 1
    for number, _, value in _fields(data):
        if number == _TEXT and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == _SCORE and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == _TYPE:
            kind = int(value)
    return Piece(text, score, _KINDS[kind])


def _piece_bytes(piece: Piece) -> bytes:
    return (
        _bytes_field(_TEXT, piece.text.encode("utf-8"))
        + _varint(_SCORE << 3 | _FIXED32)
        + struct.pack("<f", piece.score)
        + _varint_field(_TYPE, KIND_NUMBERS[piece.kind])
    )


def _fields(data: int | bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(field number, offset, value) of a message; fixed-width values come as their raw bytes."""
    if not isinstance(data, bytes):
        raise ValueError("a message is due where a number stands")
    for start, _, number, value in _spans(data):
        yield number, start, value


def _spans(data: bytes) -> Iterator[tuple[int, int, int, int | bytes]]:
    """(start, stop, field number, value) of every field; raises ValueError where the bytes make no sense."""
    at, end = 0, len(data)
    while at < end:
        start = at
        tag, at = _read_varint(data, at)
        wire = tag & 7
        if wire == _VARINT:
            value: int | bytes
            value, at = _read_varint(data, at)
        else:
            if wire == _BYTES:
                size, at = _read_varint(data, at)
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
            else:
                raise ValueError(f"wire type {wire} at byte {start}")
            if at + size > end:
                raise ValueError(f"a field of {size} bytes at byte {start} passes the end, {end}")
            value = data[at : at + size]
            at += size
        yield start, at, tag >> 3, value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    at += 1
    if byte < 0x80:
        return byte, at
    value, shift = byte & 0x7F, 7
    while byte >= 0x80:
        if shift > 63:
            raise ValueError(f"a number of more than 10 bytes before byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
    return value, at


def _signed(value: int | bytes) -> int:
    """An int32 or int64 field: negative numbers are written as their 64-bit complement."""
    number = int(value)
    return number - 2**64 if number >= 2**63 else number


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def byte_pieces() -> Iterable[Piece]:
    """The 256 pieces that stand for single bytes, `<0x00>` to `<0xFF>`."""
    return (Piece(f"<0x{value:02X}>", 0.0, "byte") for value in range(256))
