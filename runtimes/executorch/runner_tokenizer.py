"""The tokenizer as ExecuTorch's runners on Android and iOS have it: their own C++, on the file that they get.

Knows which file of an artifact that is, and the library; not what ids are right.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fox_edge.errors import ArtifactError, MissingPackageError

# What export/pte_tokenizer.py writes, and what there is where a checkpoint has no tokenizer.json.
JSON_FILE, MODEL_FILE = "executorch-tokenizer.json", "tokenizer.model"


class RunnerTokenizer:
    """A folder's tokenizer for the runners; raises ArtifactError where their library refuses the file.

    `markup` says whether it finds special tokens in a text: with a SentencePiece model it does not.
    """

    def __init__(self, folder: Path) -> None:
        with _silence():
            try:
                import pytorch_tokenizers as library
            except ImportError:
                raise MissingPackageError("pytorch_tokenizers", "executorch") from None
        self.markup = (folder / JSON_FILE).is_file()
        self.path = folder / (JSON_FILE if self.markup else MODEL_FILE)
        made = library.CppHFTokenizer if self.markup else library.CppSPTokenizer
        self._tokenizer: Any = made()
        try:
            with _silence():
                self._tokenizer.load(str(self.path))
        except RuntimeError as error:
            raise ArtifactError(f"{self.path}: ExecuTorch's runners refuse it: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without <bos>."""
        return [int(id) for id in self._tokenizer.encode(text, 0, 0)]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what C++ says to the terminal while it loads from being seen; what is wrong it raises."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
