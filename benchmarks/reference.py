"""The float32 reference, streamed: logits of a checkpoint that never is in memory as a whole.

Matrix after matrix is read, made float32, run over the whole text and dropped; then the head, in pieces of
its rows. Knows the reference model's blocks and the checkpoint; not artifacts, and not what logits are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ContextOverflowError, FoxEdgeError
from fox_edge.quant import EMBEDDING, HEAD
from fox_edge.walk import original, walk
from runtimes.base import SCORE_CHUNK, Logits

# Float32 bytes of one piece of the head, and of the logits that one pass over the head fills. Every pass
# reads and widens the whole head, so positions are gathered for it: at Fox-1's shape 256 of them.
_HEAD_PIECE_BYTES = 64 << 20
_LOGITS_BYTES = 256 << 20


class ReferenceScorer:
    """Logits of the checkpoint in float32, whatever dtype it is stored in.

    Peak memory is about one matrix, or one piece of the head and 256 MB of logits, beside the hidden states
    (tokens x C). The hidden states of the last text are kept, so that scoring it again costs the head only.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._text: tuple[int, ...] = ()
        self._hidden = torch.empty(0)

    def logits(self, tokens: Sequence[int]) -> Iterator[Logits]:
        """Logits after every token: float32 chunks (n, V), n <= SCORE_CHUNK, each the caller's to keep.

        Raises ContextOverflowError for more tokens than the model has positions.
        """
        hidden = self._hidden_states(tokens)
        vocab_size = self.checkpoint.config.vocab_size
        rows = max(1, _LOGITS_BYTES // (4 * vocab_size * SCORE_CHUNK)) * SCORE_CHUNK
        buffer = np.empty((min(rows, len(hidden)), vocab_size), np.float32)
        for start in range(0, len(hidden), rows):
            filled = buffer[: len(hidden) - start]
            self._head(hidden[start : start + rows], torch.from_numpy(filled))
            for first in range(0, len(filled), SCORE_CHUNK):
                yield filled[first : first + SCORE_CHUNK].copy()

    @torch.inference_mode()
    def _head(self, hidden: Tensor, out: Tensor) -> None:
        """Fill `out` (n, V) with the logits of hidden states (n, C), a piece of the head's rows at a time."""
        name = EMBEDDING if self.checkpoint.config.tied else HEAD
        vocab_size, width = self.checkpoint.shapes()[name]
        step = max(1, _HEAD_PIECE_BYTES // (4 * width))
        for start in range(0, vocab_size, step):
            stop = min(vocab_size, start + step)
            out[:, start:stop] = F.linear(hidden, self.checkpoint.float_rows(name, start, stop))
            self.checkpoint.release(name)

    @torch.inference_mode()
    def _hidden_states(self, tokens: Sequence[int]) -> Tensor:
        """Final hidden states (T, C) of a text."""
        config, text = self.checkpoint.config, tuple(tokens)
        if text and text == self._text:
            return self._hidden
        if not text or not 0 <= min(text) <= max(text) < config.vocab_size:
            raise FoxEdgeError(
                f"{len(text)} tokens cannot be scored: ids must be from 0 to {config.vocab_size - 1}"
            )
        if len(text) > config.max_positions:
            raise ContextOverflowError(
                f"{len(text)} tokens do not fit the model's {config.max_positions} positions"
            )
        embedded = self.checkpoint.tensor(EMBEDDING)[list(text)].float()
        self.checkpoint.release(EMBEDDING)
        hidden = walk(
            self.checkpoint, embedded[None, None], lambda name, _: [original(self.checkpoint, name)]
        )
        self._text, self._hidden = text, hidden[0]
        return self._hidden
