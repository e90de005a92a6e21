"""A loaded model and everything that its conversations share: weights, slots, the decode step, prompts.

Turns rows of a batch into tokens or logits on the host, with one wait per step. Knows slots and positions;
not conversations.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fox_edge.model import rotary_tables
from fox_edge.progress import Progress
from runtimes.base import Logits
from runtimes.cuda import choose
from runtimes.cuda.decoder import SIZES, Decoder, Outcome, likeliest
from runtimes.cuda.graphs import Graphs
from runtimes.cuda.need import SCORE_ROWS
from runtimes.cuda.prompts import Prompts
from runtimes.cuda.slots import Slots
from runtimes.cuda.sources import Source
from runtimes.cuda.weights import load
from runtimes.sampling import Choice

# Steps without a newcomer, after which those of several conversations are begun before they are asked for:
# each newcomer makes one of them void, so at most one in so many is.
CALM_STEPS = 16


class Row(NamedTuple):
    """One conversation's part in a step: `token` goes to `position` of `slot`.

    Without a choice, the logits are wanted.
    """

    slot: int
    position: int
    token: int
    choice: Choice | None


class _Ahead(NamedTuple):
    """A step that was begun before anybody asked for it: its rows, and what it will leave."""

    rows: tuple[tuple[int, int, int], ...]  # slot, position, token
    outcome: Outcome

    def places(self, rows: Sequence[Row]) -> list[int] | None:
        """Where those rows are among its own; None where it has not all of them."""
        at = {row: place for place, row in enumerate(self.rows)}
        found = [at.get(row[:3]) for row in rows]
        return None if None in found else [place for place in found if place is not None]


class Model:
    """Weights and KV cache on one device. `fixed`: rows of every batch.

    While the host looks at tokens that were chosen greedily, a GPU runs them already: mostly they are what is
    asked for next. Of several conversations, only once for some steps nobody came: a new one, like whatever
    else is done with a slot, makes the step void. What it wrote lies behind the end of each conversation.
    """

    def __init__(
        self,
        source: Source,
        conversations: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        fixed: int | None = None,
    ) -> None:
        self.config, self.device = source.config, device
        with Progress(f"loading {source.name}") as progress:
            self.weights = load(source, dtype, device, progress.update)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of pieces that were taken apart
        self.slots = Slots(self.config, conversations, context, dtype, device)
        cos, sin = rotary_tables(self.config, torch.arange(context, device=device))
        graphs = Graphs(device)
        self._decoder = Decoder(self.config, self.weights, self.slots, cos, sin, graphs, fixed)
        self._prompts = Prompts(self.config, self.weights, self.slots, cos, sin, graphs)
        self._fetch = Fetch(device)
        self.looks_ahead = device.type == "cuda"
        self._ahead: _Ahead | None = None
        self._stepping: set[int] = set()  # the slots of the last step
        self._calm = 0  # steps since one had a slot that the step before it had not

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[Logits | int]:
        """Append a token to each of several slots; logits or the token chosen, for each."""
        found: list[Logits | int] = []
        for first in range(0, len(rows), SIZES[-1]):
            found += self._step(rows[first : first + SIZES[-1]])
        return found

    def _step(self, rows: Sequence[Row]) -> list[Logits | int]:
        """A step of at most one batch, which may have been begun; the next one is, where it can be known."""
        slots, positions, tokens, choices = zip(*rows, strict=True)
        ahead, self._ahead = self._ahead, None
        places = None if ahead is None else ahead.places(rows)
        if ahead is None or places is None:
            outcome, at, is_whole = self._decoder.run(slots, positions, tokens), slice(len(rows)), True
        else:
            outcome, is_whole = ahead.outcome, places == list(range(len(ahead.rows)))
            at = slice(len(rows)) if is_whole else choose.integers(places, self.device)
        self._calm = self._calm + 1 if self._stepping.issuperset(slots) else 0
        self._stepping = set(slots)
        if is_whole and self._is_known(positions, choices):
            return self._go_on(outcome, slots, positions)
        return self._results(outcome.logits[at], outcome.best[at], choices)

    def _is_known(self, positions: Sequence[int], choices: Sequence[Choice | None]) -> bool:
        """Whether what follows a step can be begun: chosen greedily, with room, and mostly not in vain."""
        return (
            self.looks_ahead
            and (len(positions) == 1 or self._calm >= CALM_STEPS)
            and max(positions) + 1 < self.slots.positions
            and all(choice is not None and choose.is_greedy(choice) for choice in choices)
        )

    def _go_on(self, outcome: Outcome, slots: Sequence[int], positions: Sequence[int]) -> list[Logits | int]:
        """The likeliest tokens of a step, the one after which is begun before the host has them."""
        count = len(slots)
        self._fetch.start_tokens(outcome.best[:count])
        following = self._decoder.run_on(outcome, count)
        tokens = self._fetch.tokens(count)
        next_ones = zip(slots, (position + 1 for position in positions), tokens, strict=True)
        self._ahead = _Ahead(tuple(next_ones), following)
        return list(tokens)

    def _make_void(self) -> None:
        """Forget a step that was begun: something else is done now."""
        if self._ahead is not None:
            self._ahead, self._calm = None, 0

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one slot to another."""
        self._make_void()
        self.slots.copy(source, target, length)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], slot: int, past: int, choice: Choice | None) -> Logits | int:
        """Append tokens to a slot that holds `past`; logits, or the token chosen, after the last."""
        self._make_void()
        last: Tensor | None = None
        for hidden in self._prompts.run(tokens, slot, past):
            last = hidden[-1:]
        assert last is not None
        logits = self._prompts.logits(last)
        return self._results(logits, likeliest(logits), (choice,))[0]

    def score(self, tokens: Sequence[int], slot: int, past: int) -> Iterator[tuple[int, Tensor]]:
        """Append tokens chunk by chunk: how many of them are in the slot now, and their hidden states."""
        self._make_void()
        done = 0
        for hidden in self._prompts.run(tokens, slot, past):
            done += len(hidden)
            yield done, hidden

    def logits(self, hidden: Tensor) -> Iterator[Logits]:
        """Logits (n, V) on the host of hidden states, a few rows at a time."""
        for first in range(0, len(hidden), SCORE_ROWS):
            yield self._fetch.rows(self._prompts.logits(hidden[first : first + SCORE_ROWS]))

    def _results(self, logits: Tensor, best: Tensor, choices: Sequence[Choice | None]) -> list[Logits | int]:
        """What each row (n, V) is for: its logits, or the token chosen; `best` (n,) are the greedy ones."""
        drawn = [i for i, c in enumerate(choices) if c is not None and not choose.is_greedy(c)]
        wanted = [i for i, c in enumerate(choices) if c is None]
        some: list[Choice] = [choices[i] for i in drawn]  # type: ignore[misc]
        tokens, rows = best, logits[:0]
        if drawn:
            at = choose.integers(drawn, self.device)
            tokens, rows = best.clone(), logits[at]
            tokens[at] = choose.choose(rows, some)
        # Rows go to the host behind the tokens, and one wait is for both.
        kept = self._fetch.start_rows(logits[choose.integers(wanted, self.device)]) if wanted else None
        self._fetch.start_tokens(tokens)
        found: list[Logits | int] = list(self._fetch.tokens(len(tokens)))
        if drawn:
            chosen = choose.finish([int(found[i]) for i in drawn], rows, some)
            for i, token in zip(drawn, chosen, strict=True):
                found[i] = token
        for place, i in enumerate(wanted):
            assert kept is not None
            found[i] = kept[place].numpy().copy()
        return found


class Fetch:
    """The way from the device to the host: through pinned memory, waiting once for what was asked for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ids = torch.empty(SIZES[-1], dtype=torch.int64, pin_memory=self._on_gpu)
        self._rows = torch.empty(0)
        self._done = torch.cuda.Event() if self._on_gpu else None

    def start_tokens(self, ids: Tensor) -> None:
        """Token ids (n,) begin their way; what is done afterwards on the device does not hold them up."""
        self._ids[: len(ids)].copy_(ids, non_blocking=True)
        self._mark()

    def tokens(self, count: int) -> list[int]:
        """So many of them: when they are here, so is everything that was started before them."""
        self._wait()
        return [int(token) for token in self._ids[:count].tolist()]

    def start_rows(self, logits: Tensor) -> Tensor:
        """Logits (n, V): a tensor that holds them once something else was waited for, until the next call."""
        if not self._on_gpu:
            return logits
        if self._rows.numel() < logits.numel():
            self._rows = torch.empty(logits.numel(), pin_memory=True)
        here = self._rows[: logits.numel()].view_as(logits)
        return here.copy_(logits, non_blocking=True)

    def rows(self, logits: Tensor) -> Logits:
        """Logits (n, V), copied."""
        here = self.start_rows(logits)
        self._mark()
        self._wait()
        return here.numpy().copy()

    def _mark(self) -> None:
        if self._done is not None:
            self._done.record()

    def _wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()
