"""How a token is chosen on the device: what `runtimes.sampling.choose` does, for several rows at once.

The same filters in the same order, and the same draw; sums may differ in their last bits, since a device adds
in another order. Knows logits and choices; not where either came from.

Shapes: n rows, V vocabulary, K candidates, R recent tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtimes.cuda.decoder import likeliest
from runtimes.sampling import Choice

# Candidates that top-k and top-p look at first; all of them are sorted only where these do not suffice.
FIRST_CANDIDATES = 1024
_UNDECIDED = -2
# Rows that are drawn from at once, and what each then takes: some five rows of float64 numbers and indices.
ROWS_AT_ONCE, BYTES_PER_WEIGHT = 8, 48


def is_greedy(choice: Choice) -> bool:
    """Whether a choice is simply the likeliest token."""
    return choice.sampling.temperature == 0 and not _penalizes(choice)


def choose(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Tokens (n,), int64, by the choices of each row of logits (n, V), which stay as they are.

    -1 where logits are no numbers; `finish` must have a look at what comes out. Waits for nothing.
    """
    pieces = range(0, len(choices), ROWS_AT_ONCE)
    return torch.cat([_choose(logits[i : i + ROWS_AT_ONCE], choices[i : i + ROWS_AT_ONCE]) for i in pieces])


def _choose(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    shaped = penalized(logits, choices)
    tokens = likeliest(shaped)
    drawn = [i for i, choice in enumerate(choices) if choice.sampling.temperature > 0]
    if drawn:
        rows = integers(drawn, logits.device)
        found = _draw(shaped[rows], [choices[i] for i in drawn], FIRST_CANDIDATES)
        tokens[rows] = torch.where(tokens[rows] < 0, -1, found)
    return tokens


def finish(tokens: list[int], logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    """`choose`'s tokens, with those for which the first candidates did not suffice drawn from all."""
    for i, token in enumerate(tokens):
        if token == _UNDECIDED:
            row = penalized(logits[i : i + 1], choices[i : i + 1])
            tokens[i] = int(_draw(row, choices[i : i + 1], row.shape[1])[0])
    return tokens


def penalized(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Logits (n, V) after the repeat penalty: a copy, where there is one."""
    recent = [choice.recent if _penalizes(choice) else () for choice in choices]
    longest = max(map(len, recent))
    if not longest:
        return logits
    # A row is filled up with its own tokens: writing a penalized logit twice changes nothing. Where there is
    # no penalty, token 0 is divided by 1.
    ids = integers([(*r, *[r[0] if r else 0] * (longest - len(r))) for r in recent], logits.device)
    rates = [c.sampling.repeat_penalty if r else 1.0 for c, r in zip(choices, recent, strict=True)]
    rate = _numbers(rates, logits.device).float()
    held = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(held > 0, held / rate, held * rate))


def _penalizes(choice: Choice) -> bool:
    return bool(choice.recent) and choice.sampling.repeat_penalty != 1


def _draw(logits: Tensor, choices: Sequence[Choice], candidates: int) -> Tensor:
    """Tokens (n,) drawn from logits (n, V); _UNDECIDED where so many candidates do not suffice."""
    V, device = logits.shape[1], logits.device
    temperature = _numbers([c.sampling.temperature for c in choices], device)
    exact = logits.double()
    weights = torch.exp((exact - exact.amax(dim=1, keepdim=True)) / temperature)  # (n, V)
    cut = [0 < c.sampling.top_k < V or c.sampling.top_p < 1 for c in choices]
    tokens = torch.empty(len(choices), dtype=torch.int64, device=device)
    for some, draw in ((cut, _from_heaviest), ([not c for c in cut], _from_all)):
        rows = [i for i, is_one in enumerate(some) if is_one]
        if rows:
            at = integers(rows, device)
            tokens[at] = draw(weights[at], [choices[i] for i in rows], candidates)
    return tokens


def _from_all(weights: Tensor, choices: Sequence[Choice], candidates: int) -> Tensor:
    """Rows whose tokens stay in the order of their ids."""
    return _inverse(weights, choices)


def _from_heaviest(weights: Tensor, choices: Sequence[Choice], candidates: int) -> Tensor:
    """Rows of weights (n, V) of which only the heaviest may be drawn, heaviest first, equals by id."""
    V, device = weights.shape[1], weights.device
    tops = [c.sampling.top_k if 0 < c.sampling.top_k < V else V for c in choices]
    count = min(V, max([candidates, *(k + 1 for k in tops if k < V)]))
    ids = weights.topk(count, dim=1).indices.sort(dim=1).values if count < V else None
    held = weights if ids is None else weights.gather(1, ids)
    held, order = held.sort(dim=1, descending=True, stable=True)  # (n, K)
    ids = order if ids is None else ids.gather(1, order)
    ranks = torch.arange(count, device=device)
    top_k = integers(tops, device)[:, None]
    held = torch.where(ranks < top_k, held, 0.0)
    # What top-p takes shares of: all weights, or those that top-k left.
    whole = torch.where(top_k < V, held.sum(dim=1, keepdim=True), weights.sum(dim=1, keepdim=True))
    top_p = _numbers([c.sampling.top_p for c in choices], device)
    mass = held.cumsum(dim=1)
    before = (mass < top_p * whole).sum(dim=1, keepdim=True)  # the token that reaches the share is kept
    last = torch.where(top_p < 1, before, V).clamp(max=count - 1).minimum(top_k - 1)
    chosen = ids.gather(1, _inverse(torch.where(ranks <= last, held, 0.0), choices)[:, None])[:, 0]
    if count == V:
        return chosen
    # Equals of the last candidate may be missing, and what is behind it; what is heavier is all here. What
    # weighs nothing is never drawn.
    least = weights.gather(1, ids[:, -1:])
    reached = (held.gather(1, last) > least) | (least == 0)
    return torch.where(reached[:, 0], chosen, _UNDECIDED)


def _inverse(weights: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Places (n,) in rows of weights (n, K), in their order, by each choice's draw; min-p cuts first."""
    least = _numbers([c.sampling.min_p for c in choices], weights.device)
    weights = torch.where(weights >= least, weights, 0.0)  # the heaviest weighs exactly 1
    mass = weights.cumsum(dim=1)
    draw = _numbers([c.draw for c in choices], weights.device)
    places = torch.searchsorted(mass, draw * mass[:, -1:], right=True)
    ranks = torch.arange(weights.shape[1], device=weights.device)
    last = torch.where(weights > 0, ranks, 0).amax(dim=1, keepdim=True)
    return places.minimum(last)[:, 0]


def _numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """(n, 1) float64. What is not pinned is copied before this returns, without waiting for the device."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)[:, None]


def integers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64, in the shape given."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
