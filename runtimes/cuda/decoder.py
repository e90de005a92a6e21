"""The decode step: one token of each of several conversations, in one pass over the weights.

Everything that a step reads and writes lies at fixed places, so that on a GPU the whole step is one CUDA
graph per size of a batch, recorded when the size first comes. A batch is filled up to the next size with rows
that write into the scratch slot. Knows weights, slots and its buffers; not conversations, nor how tokens are
chosen other than greedily.

Shapes: B rows of a batch, C hidden size, V vocabulary.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from fox_edge.config import FoxConfig
from runtimes.cuda import ops
from runtimes.cuda.graphs import Graphs
from runtimes.cuda.slots import Slots
from runtimes.cuda.weights import Weights

# Rows of a batch that there is a graph for.
SIZES = (1, 2, 4, 8, 16, 32, 64)


def size_of(rows: int) -> int:
    """The size of the batch that so many rows run in; there are at most SIZES[-1]."""
    return SIZES[bisect.bisect_left(SIZES, rows)]


class Outcome(NamedTuple):
    """What a step leaves on the device, until the next step of the same size."""

    logits: Tensor  # (B, V) float32
    best: Tensor  # (B,) int64: the likeliest token, -1 where logits are no numbers


class Inputs:
    """Tokens, slots and positions of a batch, at fixed places: one copy takes all of them to the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = torch.zeros(16 * size, dtype=torch.uint8, pin_memory=pinned)
        self._there = self._host.to(device) if pinned else self._host
        self._pinned, self._size = pinned, size
        self.tokens, self.slots, self.positions = self._parts(self._there)  # (B,) int64, int32, int32
        self._numbers: list[NDArray[Any]] = [part.numpy() for part in self._parts(self._host)]

    def fill(self, slots: Sequence[int], positions: Sequence[int], tokens: Sequence[int], spare: int) -> None:
        """Write a batch; rows behind it are of token 0 at position 0 of the slot `spare`."""
        for numbers, given, rest in zip(
            self._numbers, (tokens, slots, positions), (0, spare, 0), strict=True
        ):
            numbers[: len(given)] = given
            numbers[len(given) :] = rest
        if self._pinned:
            self._there.copy_(self._host, non_blocking=True)

    def advance(self, best: Tensor, rows: int) -> None:
        """Make of a batch the one after it, on the device alone: `best` (B,) follow in its first rows."""
        self.tokens[:rows].copy_(best[:rows].clamp(min=0))  # -1, of logits that are no numbers, is no token
        self.positions[:rows].add_(1)

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self._size
        small = buffer[8 * n :].view(torch.int32)
        return buffer[: 8 * n].view(torch.int64), small[:n], small[n:]


class Decoder:
    """Runs steps. `fixed`: all batches have this size, so that a row's bits do not depend on the others.

    `cos`, `sin` (S, D/2) are the rotary tables of all positions.
    """

    def __init__(
        self,
        config: FoxConfig,
        weights: Weights,
        slots: Slots,
        cos: Tensor,
        sin: Tensor,
        graphs: Graphs,
        fixed: int | None = None,
    ) -> None:
        self._config, self._weights, self._slots = config, weights, slots
        self._cos, self._sin, self._graphs, self._fixed = cos, sin, graphs, fixed
        self._device = slots.keys.device
        self._inputs: dict[int, Inputs] = {}

    def size(self, rows: int) -> int:
        """Rows of the batch that so many conversations run in."""
        return self._fixed or size_of(rows)

    @torch.inference_mode()
    def run(self, slots: Sequence[int], positions: Sequence[int], tokens: Sequence[int]) -> Outcome:
        """Append a token to each slot, whose next position is given; on a GPU this waits for nothing.

        The outcome's first rows are theirs.
        """
        size = self.size(len(slots))
        if size not in self._inputs:
            self._inputs[size] = Inputs(size, self._device)
        self._inputs[size].fill(slots, positions, tokens, self._slots.scratch)
        return self._run(size)

    @torch.inference_mode()
    def run_on(self, outcome: Outcome, rows: int) -> Outcome:
        """Append the likeliest tokens, before the host has seen them, to the rows that were just run.

        `outcome` is theirs, and on a GPU the result lies where it lay. There must be room in their slots.
        """
        size = len(outcome.best)
        self._inputs[size].advance(outcome.best, rows)
        return self._run(size)

    def _run(self, size: int) -> Outcome:
        """A step of the batch that lies in its place."""
        return self._graphs.run(
            ("step", size), lambda: self._step(self._inputs[size]), prepare=lambda: self._tune(size)
        )

    def _step(self, at: Inputs) -> Outcome:
        """The pass itself: static shapes, and nothing that looks at a value on the host."""
        w, eps = self._weights, self._config.rms_norm_eps
        keys, values = self._slots.keys, self._slots.values
        x = ops.embed(w.embedding, at.tokens, keys.dtype)  # (B, C)
        for n, layer in enumerate(w.layers):
            qkv = ops.norm_linear(x, layer.attention_norm, eps, layer.qkv)
            y = ops.attend(qkv, keys[n], values[n], at.slots, at.positions, self._cos, self._sin)
            ops.linear_add(y, layer.o, x)
            ops.linear_add(ops.norm_gate_up(x, layer.mlp_norm, eps, layer.gate_up), layer.down, x)
        logits = ops.head(x, w.norm, eps, w.head)
        return Outcome(logits, likeliest(logits))

    def _tune(self, size: int) -> None:
        """Let every operation find its quickest way with these matrices."""
        w, dtype = self._weights, self._slots.keys.dtype
        ops.tune("norm_linear", [layer.qkv for layer in w.layers], size, dtype)
        ops.tune("linear_add", [layer.o for layer in w.layers], size, dtype)
        ops.tune("norm_gate_up", [layer.gate_up for layer in w.layers], size, dtype)
        ops.tune("linear_add", [layer.down for layer in w.layers], size, dtype)
        ops.tune("head", [w.head], size, dtype)


def likeliest(logits: Tensor) -> Tensor:
    """The first of the likeliest tokens (B,) of logits (B, V); -1 where that is no number."""
    peak, best = logits.max(dim=-1)
    return torch.where(peak.isfinite(), best, -1)
