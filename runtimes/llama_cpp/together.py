"""Passes for several conversations of one llama.cpp context: who takes part, and how many may.

Kernels sum in another order where a pass has more rows than they were written for, or one instead of several.
Up to how many rows every bit is that of a lone step depends on the types of the weights and on the processor;
nobody can guess it, but a few passes show it. Knows contexts and sequences; not sessions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from runtimes.base import Logits
from runtimes.llama_cpp.context import Context

# More rows are not looked at: few processors gain from them, and looking takes a pass for each number.
MOST_ROWS = 8
_FILLER = 0  # a token that every vocabulary has


def step(context: Context, tokens: Sequence[int], sequences: Sequence[int]) -> Iterator[tuple[int, Logits]]:
    """Append one token to each of several sequences, in passes of at most `context.limit` rows.

    Yields (place among the tokens, logits (vocab,) that are good until the next one). When a pass fails,
    earlier ones have been run: the caller cuts all sequences back.
    """
    places = sorted(range(len(tokens)), key=lambda place: sequences[place])
    passes = -(-len(places) // context.limit)
    size = -(-len(places) // passes)
    for first in range(0, len(places), size):
        part = places[first : first + size]
        rows = _pass(context, {sequences[place]: tokens[place] for place in part})
        yield from zip(part, rows, strict=True)


def _pass(context: Context, asked: dict[int, int]) -> Logits:
    """One pass for sequences in order, each with its token: logits (n, vocab).

    llama.cpp takes together only what stands side by side: between two sequences a single missing one is
    filled with a token that is forgotten at once, which costs a row and saves a pass.
    """
    fillers = [
        before + 1
        for before, after in pairwise(asked)
        if after - before == 2 and context.length(before + 1) < context.cells
    ][: context.limit - len(asked)]
    members = sorted([*asked, *fillers])
    lengths = [context.length(sequence) for sequence in members]
    tokens = [asked.get(sequence, _FILLER) for sequence in members]
    try:
        return context.run(tokens, lengths, members, [sequence in asked for sequence in members])
    finally:
        for sequence, length in zip(members, lengths, strict=True):
            if sequence not in asked:
                context.truncate(sequence, length)


def rows_that_agree(context: Context) -> int:
    """Up to how many rows of a pass have the bits that lone steps give, with these weights on this machine.

    At least 1. All sequences are empty before and afterwards.
    """
    most = min(context.conversations, MOST_ROWS)
    vocabulary = context.weights.vocab_size
    prompts = [[(7 * s + k) % vocabulary for k in range(1, 3 + s % 3)] for s in range(most)]
    for s, prompt in enumerate(prompts):
        context.run(prompt, range(len(prompt)), [s] * len(prompt), [False] * len(prompt))
    try:
        alone = [_rows(context, prompts, [s])[0] for s in range(most)]
        for count in range(2, most + 1):
            if not np.array_equal(_rows(context, prompts, range(count)), alone[:count]):
                return count - 1
        return most
    finally:
        for s in range(most):
            context.truncate(s, 0)


def _rows(context: Context, prompts: Sequence[Sequence[int]], sequences: Sequence[int]) -> Logits:
    """A copy of the logits after one more token of each, which is forgotten again."""
    lengths = [len(prompts[s]) for s in sequences]
    tokens = [prompts[s][-1] for s in sequences]
    rows = context.run(tokens, lengths, sequences, [True] * len(tokens)).copy()
    for s in sequences:
        context.truncate(s, len(prompts[s]))
    return rows
