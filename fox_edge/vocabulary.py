"""A tokenizer's pieces by id, packed: 256,000 of them take 6 MB, and ten times that as Python objects.

Knows texts, scores and kinds; nothing of files, or of what a piece means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("normal", "unknown", "control", "user_defined", "unused", "byte")
# No UTF-8 text has this byte.
_SEPARATOR = b"\xff"


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of a vocabulary; its index is its id. A space inside `text` is written U+2581."""

    text: str
    score: float
    kind: str  # one of KINDS


class Vocabulary:
    """Pieces, none of which can be changed."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        texts = [_bytes(piece.text) for piece in pieces]
        # Before each text and behind the last stands a separator: what is found between two is a whole piece.
        self._texts = b"".join(part for text in texts for part in (_SEPARATOR, text)) + _SEPARATOR
        lengths = np.fromiter((len(text) + 1 for text in texts), np.int64, len(texts))
        self._starts = np.concatenate([[1], 1 + np.cumsum(lengths)])
        self._scores = np.fromiter((piece.score for piece in pieces), np.float64, len(texts))
        self._kinds = np.fromiter((KINDS.index(piece.kind) for piece in pieces), np.uint8, len(texts))

    def __len__(self) -> int:
        return len(self._kinds)

    def __getitem__(self, id: int) -> Piece:
        return Piece(self.text(id), float(self._scores[id]), self.kind(id))

    def __iter__(self) -> Iterator[Piece]:
        return (self[id] for id in range(len(self)))

    def text(self, id: int) -> str:
        """The text of a piece."""
        return self.utf8(id).decode("utf-8", "surrogatepass")

    def utf8(self, id: int) -> bytes:
        """The same as UTF-8."""
        start, stop = self._starts[id : id + 2].tolist()
        return self._texts[start : stop - 1]

    def kind(self, id: int) -> str:
        """What kind of piece it is."""
        return KINDS[self._kinds[id]]

    def find(self, text: str) -> int | None:
        """The lowest id of a text; None when no piece is exactly that."""
        at = self._texts.find(_SEPARATOR + _bytes(text) + _SEPARATOR)
        return None if at < 0 else int(np.searchsorted(self._starts, at + 1))

    def of_kinds(self, kinds: Iterable[str]) -> list[int]:
        """Ids of all pieces of these kinds, ascending."""
        found: list[int] = np.flatnonzero(
            np.isin(self._kinds, [KINDS.index(kind) for kind in kinds])
        ).tolist()
        return found


def _bytes(text: str) -> bytes:
    # A file may hold half a surrogate pair; it comes back as it was.
    return text.encode("utf-8", "surrogatepass")
