"""The float32 reference, streamed: logits of a checkpoint that never is in memory as a whole.

First the layers: matrix after matrix is read, made float32, run over whole texts and dropped, which leaves a
row of hidden states per position, a hundredth of its logits. Then the head, in pieces of its rows. Knows the
reference model's blocks and the checkpoint; not artifacts, and not what logits are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.errors import ContextOverflowError, FoxEdgeError
from fox_edge.quant import EMBEDDING, HEAD
from fox_edge.walk import original, walk
from runtimes.base import SCORE_CHUNK, Logits

# Float32 bytes of one piece of the head, and of the logits that one pass over the head fills. Every pass
# reads and widens the whole head, so positions are gathered for it: at Fox-1's shape 256 of them.
_HEAD_PIECE_BYTES = 64 << 20
_LOGITS_BYTES = 256 << 20
# What windows that go through the layers together may take in activations: at Fox-1's shape 8,192 tokens.
_ACTIVATION_BYTES = 512 << 20


class ReferenceScorer:
    """Logits of the checkpoint in float32, whatever dtype it is stored in.

    Peak memory is about one matrix, or one piece of the head and 256 MB of logits, beside the hidden states
    (tokens x C). The hidden states of the last text are kept, so that scoring it again costs the head only.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._head = ReferenceHead(checkpoint)
        self._text: tuple[int, ...] = ()
        self._hidden = torch.empty(0)

    def logits(self, tokens: Sequence[int]) -> Iterator[Logits]:
        """Logits after every token: float32 chunks (n, V), n <= SCORE_CHUNK, each the caller's to keep.

        Raises ContextOverflowError for more tokens than the model has positions.
        """
        for chunk in self.passing_logits(tokens):
            yield chunk.copy()

    def passing_logits(self, tokens: Sequence[int]) -> Iterator[Logits]:
        """The same without a copy: each chunk is good until the next is asked for."""
        text = tuple(tokens)
        if not text or text != self._text:
            (hidden,) = hidden_states(self.checkpoint, [text])
            self._text, self._hidden = text, hidden[0]
        yield from self._head.logits(self._hidden.numpy())


class ReferenceHead:
    """Hidden states to logits by a checkpoint's own head, float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._name = EMBEDDING if checkpoint.config.tied else HEAD
        self.vocab_size, self._width = checkpoint.shapes()[self._name]

    def logits(self, hidden: NDArray[np.float32]) -> Iterator[Logits]:
        """Logits of hidden states (n, C): chunks (m, V), m <= SCORE_CHUNK, each good until the next.

        Raises CheckpointError naming the row of a head that holds NaN or infinity.
        """
        rows = max(1, _LOGITS_BYTES // (4 * self.vocab_size * SCORE_CHUNK)) * SCORE_CHUNK
        logits = torch.empty(min(rows, len(hidden)), self.vocab_size)
        step = max(1, _HEAD_PIECE_BYTES // (4 * self._width))
        # Memory that is asked for once: fresh pages for every piece cost a tenth of the product.
        piece = torch.empty(min(step, self.vocab_size), self._width)
        for start in range(0, len(hidden), rows):
            # A copy of few rows: what comes may be mapped from a file, read-only.
            some = torch.from_numpy(np.array(hidden[start : start + rows]))
            self._fill(logits[: len(some)], some, piece)
            for first in range(0, len(some), SCORE_CHUNK):
                yield logits[first : min(first + SCORE_CHUNK, len(some))].numpy()

    @torch.inference_mode()
    def _fill(self, out: Tensor, hidden: Tensor, piece: Tensor) -> None:
        """Fill `out` (n, V) with the logits of hidden states (n, C); `piece` is room for rows of the head."""
        head = self._checkpoint.tensor(self._name)
        for start in range(0, self.vocab_size, len(piece)):
            stop = min(self.vocab_size, start + len(piece))
            weights = piece[: stop - start].copy_(head[start:stop])
            part = torch.mm(hidden, weights.T, out=out[:, start:stop])
            # A finite sum has finite terms; what is not is looked for where it can be named.
            if not torch.isfinite(part.sum()):
                self._checkpoint.float_rows(self._name, start, stop)
            self._checkpoint.release(self._name)


@torch.inference_mode()
def hidden_states(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    first: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Tensor]:
    """Final hidden states of windows of equal length T, float32 (some windows, T - first, C) at a time.

    Each window stands alone; positions before `first` are left out. As many go through the layers together
    as bounded activations allow, since each group reads and widens every matrix. Raises FoxEdgeError for
    token ids that do not exist, ContextOverflowError for more positions than the model has.
    """
    config = checkpoint.config
    for window in windows:
        _check(window, config)
    per_token = 4 * (2 * config.intermediate_size + 4 * config.hidden_size)
    most = max(1, _ACTIVATION_BYTES // (per_token * len(windows[0])))
    # Groups of about the same size.
    count = -(-len(windows) // most)
    size = -(-len(windows) // count)
    for n, start in enumerate(range(0, len(windows), size)):
        ids = torch.tensor([list(window) for window in windows[start : start + size]])
        embedded = checkpoint.tensor(EMBEDDING)[ids].float()
        checkpoint.release(EMBEDDING)
        hidden = walk(
            checkpoint,
            embedded[None],
            lambda name, _: [original(checkpoint, name)],
            after_layer=lambda layer, _, n=n: progress(
                n * config.num_layers + layer, count * config.num_layers
            ),
        )
        yield hidden.view(*ids.shape, -1)[:, first:]


def _check(tokens: Sequence[int], config: FoxConfig) -> None:
    if not tokens or not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
        raise FoxEdgeError(
            f"{len(tokens)} tokens cannot be scored: ids must be from 0 to {config.vocab_size - 1}"
        )
    if len(tokens) > config.max_positions:
        raise ContextOverflowError(
            f"{len(tokens)} tokens do not fit the model's {config.max_positions} positions"
        )
