"""Texts that models are compared on, as windows of token ids. Knows tokenizers; not models.

Windows are llama-perplexity's, so that its numbers and ours can be laid side by side: the text's tokens are
cut into windows of equal length, each begins with <bos> in place of its first token (where the tokenizer puts
one before texts), what is left over at the end is dropped, and the predictions of the second half of each
window count, so that every one of them has some context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fox_edge.errors import ContextOverflowError, FoxEdgeError

if TYPE_CHECKING:
    from fox_edge.tokenizer import Tokenizer

WINDOW = 512
TOKENS = 4096
MAX_TEXT_BYTES = 64 << 20
MAX_TOKENS = 1 << 20
# The built-in text begins with problems that nano never saw; a longer one goes on with problems of this seed.
_HELD_OUT, _SEED = 200, 41


@dataclass(frozen=True)
class Windows:
    """Token ids in windows of equal length T, and where their text came from.

    A position of a window predicts the token after it: those from `first` to T - 2 are compared.
    """

    source: str  # 'built-in', or the file's name
    windows: list[list[int]]
    first: int

    @property
    def length(self) -> int:
        """T."""
        return len(self.windows[0])

    @property
    def scored(self) -> int:
        """Positions of each window that are compared."""
        return self.length - 1 - self.first

    @property
    def inputs(self) -> list[list[int]]:
        """The windows without their last tokens, after which nothing comes."""
        return [window[:-1] for window in self.windows]

    def targets(self) -> list[int]:
        """The token that came after each compared position, window after window."""
        return [token for window in self.windows for token in window[self.first + 1 :]]

    def to_json(self) -> dict[str, Any]:
        """What reports say of it."""
        return {
            "source": self.source,
            "tokens": self.length * len(self.windows),
            "windows": len(self.windows),
            "window": self.length,
            "scored_from": self.first,
            "scored_per_window": self.scored,
        }


def read_windows(
    tokenizer: Tokenizer,
    context: int,
    *,
    file: Path | None = None,
    tokens: int = TOKENS,
    window: int | None = None,
    score_from: int | None = None,
) -> Windows:
    """The first `tokens` of a UTF-8 file, or of the built-in text, in windows of `window` (default: 512).

    `context`: positions that the model has. `score_from` is the first position of each window that counts;
    None: half of the window. Raises FoxEdgeError for a file that is not there, too large, no UTF-8, or
    shorter than one window, and for numbers that do not fit together.
    """
    length = min(WINDOW, context) if window is None else window
    first = length // 2 if score_from is None else score_from
    if length > context:
        raise ContextOverflowError(
            f"a window of {length} tokens does not fit the model's {context} positions"
        )
    if not 0 <= first <= length - 2:
        raise FoxEdgeError(
            f"a window of {length} tokens has predictions to compare at positions 0 to {length - 2}, "
            f"none from {first} on"
        )
    if not length <= tokens <= MAX_TOKENS:
        raise FoxEdgeError(
            f"{tokens} tokens were asked for, but one window takes {length}, and {MAX_TOKENS} are the most"
        )
    ids = _built_in(tokenizer, tokens) if file is None else _with_bos(tokenizer, read_text(file))
    source = "built-in" if file is None else file.name
    count = min(len(ids), tokens) // length
    if count == 0:
        raise FoxEdgeError(f"{file}: {len(ids)} tokens of text, but one window takes {length}")
    found = [ids[start : start + length] for start in range(0, count * length, length)]
    for cut in found if tokenizer.add_bos else ():
        cut[0] = ids[0]
    return Windows(source, found, first)


def read_text(file: Path) -> str:
    """A UTF-8 file as one text; raises FoxEdgeError."""
    try:
        size = file.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise FoxEdgeError(f"{file}: {size} bytes, but a text has at most {MAX_TEXT_BYTES}")
        with file.open(encoding="utf-8", newline="") as stream:
            # Devices and pipes have no size, and files may grow.
            return stream.read(MAX_TEXT_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise FoxEdgeError(f"{file}: not readable as UTF-8 text ({error})") from None


def built_in_text(tokenizer: Tokenizer, tokens: int) -> str:
    """Word problems with their worked answers, at least so many tokens of them; the same every time."""
    count = 60
    while len(tokenizer.encode(text := word_problems(count))) < tokens:
        count *= 2
    return text


@cache
def word_problems(count: int) -> str:
    """So many of the project's own word problems with their worked answers, as one text."""
    from fox_edge.nano.problems import generate, held_out

    problems = held_out(min(count, _HELD_OUT)) + generate(_SEED, max(0, count - _HELD_OUT))
    return "\n\n".join(f"Question: {p.question}\nAnswer: {p.answer}" for p in problems)


def _built_in(tokenizer: Tokenizer, tokens: int) -> list[int]:
    return _with_bos(tokenizer, built_in_text(tokenizer, tokens))


def _with_bos(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's ids, <bos> first where the tokenizer puts it there."""
    return tokenizer.encode(text, bos=tokenizer.add_bos)
