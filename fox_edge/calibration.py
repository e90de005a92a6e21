"""The text that rounding is guided by: read, cut into windows, described for the manifest.

Knows the built-in text and how a user's becomes token ids; not the model, nor rounding.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fox_edge.errors import FoxEdgeError
from fox_edge.tokenizer import Tokenizer

WINDOW = 256
# Enough for a 4,096 x 4,096 Gram matrix of full rank, twice; mean squares settle much sooner.
GRAM_TOKENS = 8192
MEAN_SQUARE_TOKENS = 1024
MAX_TEXT_BYTES = 64 << 20
# Several kinds of prose, and problems of nano's families after each paragraph.
_BUILT_IN, _SEED, _PROBLEMS = "calibration.txt", 7, 8


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids (N, T) and where their text came from."""

    windows: Tensor
    source: str  # 'built-in', or the file's name
    sha256: str  # of the token ids, int64

    @property
    def tokens(self) -> int:
        """Token ids in all windows."""
        return self.windows.numel()

    def to_json(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {"source": self.source, "tokens": self.tokens, "sha256": self.sha256}

    def first(self, tokens: int) -> Calibration:
        """The first windows, about so many tokens of them and at least one window."""
        count = max(1, tokens // self.windows.shape[1])
        return Calibration(self.windows[:count], self.source, self.sha256)


def read_calibration(tokenizer: Tokenizer, context: int, file: Path | None = None) -> Calibration:
    """Cut a UTF-8 file, or the built-in text, into windows that each begin with <bos>.

    Raises FoxEdgeError for a file that is not there, too large, no UTF-8, or shorter than one window.
    """
    ids = _built_in(tokenizer) if file is None else tokenizer.encode(_read(file), bos=False)
    length = min(WINDOW, context)
    head = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    step = length - len(head)
    count = min(len(ids) // step, -(-GRAM_TOKENS // length))
    if count == 0:
        raise FoxEdgeError(f"{file}: {len(ids)} tokens of calibration text, but a window takes {step}")
    windows = torch.tensor([head + ids[i * step : (i + 1) * step] for i in range(count)])
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return Calibration(windows, "built-in" if file is None else file.name, digest)


def _read(file: Path) -> str:
    try:
        size = file.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise FoxEdgeError(f"{file}: {size} bytes, but calibration text has at most {MAX_TEXT_BYTES}")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FoxEdgeError(f"{file}: not readable as UTF-8 text ({error})") from None


def _built_in(tokenizer: Tokenizer) -> list[int]:
    """Prose of several kinds, written for this purpose, with word problems in between, plain and as chats."""
    from fox_edge.nano.problems import generate

    prose = resources.files(__package__).joinpath(_BUILT_IN).read_text(encoding="utf-8").split("\n\n")
    problems = iter(generate(_SEED, _PROBLEMS * len(prose)))
    found: list[int] = []
    for paragraph in prose:
        found += tokenizer.encode(f"{paragraph}\n\n", bos=False)
        for k in range(_PROBLEMS):
            problem = next(problems)
            if k % 2:
                plain = f"Question: {problem.question}\nAnswer: {problem.answer}\n\n"
                found += tokenizer.encode(plain, bos=False)
            else:  # as the model's users ask it
                asked = tokenizer.encode_chat([{"role": "user", "content": problem.question}])
                found += asked[1:] if asked[0] == tokenizer.bos_id else asked
                found += tokenizer.encode(f"{problem.answer}\n\n", bos=False)
    return found
