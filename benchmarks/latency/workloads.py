"""What is asked of a model while the clock runs: named workloads, their prompts in a subject's own tokens.

A workload is a fixed list of conversations, each a list of turns of so many tokens; after every turn the
model answers with the same number of tokens. Most have one turn each. Prompts are cut from text that the
project owns. Knows lengths and text; not sessions, clocks or machines.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from statistics import NormalDist
from typing import TypeAlias

from benchmarks.fidelity.divergence import reference_text
from fox_edge.errors import FoxEdgeError
from fox_edge.tokenizer import Tokenizer

Turns: TypeAlias = list[list[int]]  # token ids of each turn of one conversation
Waves: TypeAlias = list[list[Turns]]  # conversations that are held side by side, one per user

PROMPT_TOKENS, DECODE_TOKENS = 234, 64
# The paper's: prompts of 234 tokens on average, 512 out.
PAPER_OUT = 512
# Eight, so that 1, 2, 4 or 8 users share them evenly, and that 3 passes on a slow machine end in an hour.
_PAPER_PROMPTS = 8
# A seed whose eight lengths deviate as the distribution does, and whose mean is 1.7 times their median.
_PAPER_SEED = 227
# Standard deviation of the logarithm of a chat prompt's length. Of MT-Bench's 160 questions it is 0.88, and
# their mean is 1.84 times their median; at 1.0 that factor is exp(1/2) = 1.65.
_PAPER_SIGMA = 1.0
_PROBLEMS, _SEED = 200, 11


@dataclass(frozen=True)
class Workload:
    """Conversations of turns of so many prompt tokens, each answered with `decode_tokens` after the first."""

    name: str
    conversations: tuple[tuple[int, ...], ...]
    decode_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a turn, on average."""
        lengths = [n for turns in self.conversations for n in turns]
        return round(sum(lengths) / len(lengths))

    @property
    def longest(self) -> int:
        """Prompt tokens of the longest conversation, all its turns together."""
        return max(sum(turns) for turns in self.conversations)

    @property
    def positions(self) -> int:
        """Positions of the longest conversation, and of its answers with the token that a prompt gives."""
        return max(sum(turns) + len(turns) * (1 + self.decode_tokens) for turns in self.conversations)

    @property
    def middle(self) -> int:
        """Tokens in the KV cache in the middle of an answer, on average over all answers."""
        held = []
        for turns in self.conversations:
            done = 0
            for n in turns:
                held.append(done + n + self.decode_tokens // 2)
                done += n + 1 + self.decode_tokens
        return round(sum(held) / len(held))

    def check(self, spec: str, context: int) -> None:
        """Raises FoxEdgeError, with the numbers, when a context cannot hold it."""
        if self.positions <= context:
            return
        turns = max(len(turns) for turns in self.conversations)
        what = f"a prompt of {self.longest} tokens and {self.decode_tokens + 1} more do"
        if turns > 1:
            what = (
                f"{turns} turns of {self.longest} tokens together and {self.decode_tokens + 1} after each do"
            )
        message = f"{spec}: {what} not fit a context of {context}"
        most = (context - self.longest) // turns - 1
        if self.name != "custom":
            hint = f"--decode-tokens {most} would" if most > 0 else "no answer is short enough"
            message += f" (workload {self.name}; {hint})"
        raise FoxEdgeError(message)


def _paper_lengths() -> tuple[int, ...]:
    """Lengths as chat prompts have them: log-normal, one from each eighth of the distribution, mean 234.

    One draw per eighth keeps the spread, tail included, in a set this small; scaled to the mean exactly.
    """
    rng = random.Random(_PAPER_SEED)
    normal = NormalDist(0, _PAPER_SIGMA)
    drawn = [math.exp(normal.inv_cdf((n + rng.random()) / _PAPER_PROMPTS)) for n in range(_PAPER_PROMPTS)]
    total = PROMPT_TOKENS * _PAPER_PROMPTS
    lengths = [round(x * total / sum(drawn)) for x in drawn]
    lengths[-1] += total - sum(lengths)
    rng.shuffle(lengths)
    return tuple(lengths)


def _single(name: str, lengths: Sequence[int], decode_tokens: int) -> Workload:
    return Workload(name, tuple((n,) for n in lengths), decode_tokens)


WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        _single("custom", [PROMPT_TOKENS], DECODE_TOKENS),
        _single("paper", _paper_lengths(), PAPER_OUT),
        _single("short", [32], DECODE_TOKENS),
        _single("long", [4000], DECODE_TOKENS),
        # A question, then what people say to an answer: mostly shorter, once something pasted in.
        Workload("chat", ((60, 24, 45, 18, 120, 33),), DECODE_TOKENS),
    )
}


def find_workload(name: str, prompt_tokens: int | None = None, decode_tokens: int | None = None) -> Workload:
    """The workload of that name, with other lengths where they are given.

    Raises FoxEdgeError for a name that is unknown, or a prompt length for a workload that has its own.
    """
    if name not in WORKLOADS:
        raise FoxEdgeError(f"no workload is named '{name}'; there are {', '.join(WORKLOADS)}")
    workload = WORKLOADS[name]
    if prompt_tokens is not None:
        if name != "custom":
            raise FoxEdgeError(
                f"the prompts of workload {name} are fixed ({workload.prompt_tokens} tokens on average); "
                f"--prompt-tokens {prompt_tokens} goes with --workload custom"
            )
        workload = replace(workload, conversations=((prompt_tokens,),))
    return workload if decode_tokens is None else replace(workload, decode_tokens=decode_tokens)


def waves(workload: Workload, tokenizer: Tokenizer, users: int = 1) -> Waves:
    """The conversations as token ids, `users` of them at a time; begun anew until every wave is full.

    Each has its own stretch of the text, <bos> before its first turn. The same for the same tokenizer.
    """
    count = -(-len(workload.conversations) // users) * users
    made = [workload.conversations[n % len(workload.conversations)] for n in range(count)]
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    stream = tokenizer.encode(text(), bos=False)
    at, conversations = 0, []
    for turns in made:
        ids, at = _cut(stream, at, sum(turns) - len(head))
        conversations.append(_split(head + ids, turns))
    return [conversations[n : n + users] for n in range(0, count, users)]


def _cut(stream: Sequence[int], start: int, count: int) -> tuple[list[int], int]:
    """`count` ids from `start` on, around the end where need be, and where the next ones begin."""
    ids = [stream[(start + n) % len(stream)] for n in range(count)]
    return ids, (start + count) % len(stream)


def _split(ids: list[int], lengths: Sequence[int]) -> Turns:
    parts = iter(ids)
    return [[next(parts) for _ in range(n)] for n in lengths]


@cache
def text() -> str:
    """About 80,000 characters of the project's own: problems with their answers, prose, more problems."""
    from fox_edge.nano.problems import generate

    prose = resources.files("fox_edge").joinpath("calibration.txt").read_text(encoding="utf-8")
    more = [f"{p.question} {p.answer}" for p in generate(_SEED, _PROBLEMS)]
    return "\n\n".join((reference_text(), prose, *more))
