"""Speculation without a second model: what came before guesses what comes next.

Answers repeat: names, numbers, a text that is to be edited. Where the last few tokens occurred before, the
tokens that followed them then are run together with the newest one, in one batch that reads the weights once.
Each row of logits is the one that a step would have given, so that whoever takes a token that was guessed has
its logits already, and whoever takes another loses nothing but the batch's extra time.

Knows sessions, tokens and time; not how a token is chosen, nor text.

What is promised: the text of plain greedy decoding, as long as rounding moves no lead by `GUARD`. A batch
rounds differently from single steps, in its logits and in the keys and values that it leaves in the cache. So
a token is only taken on such a cache where its logit leads by more than `GUARD` standard deviations; else all
since the cache was last as single steps make it is run again, token by token, and then decided.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.base import Logits, Session, SessionOptions

# Tokens that must have occurred before: the longest match is looked for first.
LONGEST, SHORTEST = 4, 2
# Most tokens that are guessed at once.
MOST = 8
# What a lead must be at least, in standard deviations of the logits: twice the largest at which a batch's row
# had another best token than a step's (0.077 in 2,155 rows; see docs/running.md).
GUARD = 0.15
# A guess of this size is made where few tokens are expected to be right.
_SMALL = 3
# What guessing must promise to save, steps after which costs are forgotten, the weight of a new figure, and
# how many times of steps and batches are remembered.
_MARGIN, _FORGET, _NEW_SHARE = 1.1, 256, 0.25
_RECENT = 9
# Steps shorter than this cannot be shortened by what watching them costs: some 0.04 ms each.
_WORTH_WATCHING_S = 0.002


def speculating(session: Session, options: SessionOptions) -> Session:
    """The session as it is, or one that guesses ahead on it, as the options say."""
    if options.speculate is None:
        return session
    if options.speculate == "auto":
        return LookupSession(session)
    return LookupSession(session, most=options.speculate, adaptive=False)


class History:
    """Tokens in order, and what followed every short sequence of them when it last occurred."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], list[int]] = {}
        self._watching = True

    def append(self, tokens: Sequence[int]) -> None:
        """More tokens."""
        for token in tokens:
            self.tokens.append(int(token))
            if self._watching:
                self._note(len(self.tokens))

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        for end in range(len(self.tokens), length, -1) if self._watching else ():
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                places = self._after[tuple(self.tokens[end - size : end])]
                places.pop()
        del self.tokens[length:]

    def guess(self, most: int) -> tuple[int, list[int]]:
        """What followed when the newest tokens occurred before, and how many of them matched.

        The longest match, and of those the last; nothing where there is none.
        """
        end = len(self.tokens)
        for size in range(min(LONGEST, end), SHORTEST - 1, -1):
            places = self._after.get(tuple(self.tokens[end - size :]), ())
            # The newest place is the end itself.
            if len(places) > 1:
                return size, self.tokens[places[-2] : places[-2] + most]
        return 0, []

    def stop_watching(self) -> None:
        """From here on keep the tokens, and no more of them."""
        self._after, self._watching = {}, False

    def _note(self, end: int) -> None:
        for size in range(SHORTEST, min(LONGEST, end) + 1):
            self._after.setdefault(tuple(self.tokens[end - size : end]), []).append(end)


class Worth:
    """Whether guessing pays, from what it costs and how often it is right; in seconds.

    How many tokens of a guess were right is known without running it: the tokens come anyway. What a step
    and a batch cost is the median of the last few, what had to be run again the mean of all. Where guesses
    did not save what they promised, more must be promised. Costs are forgotten now and then, ever later, so
    that another try is made.
    """

    def __init__(self) -> None:
        self._step_s: deque[float] = deque(maxlen=_RECENT)
        self._batch_s: dict[int, deque[float]] = {}  # by the size of the guess
        self._right: dict[int, float] = {}  # by the length of the match
        self._again_s = self._made = 0.0
        self._saved_s: float | None = None
        self._margin = _MARGIN
        self._age, self._forget = 0, _FORGET

    def size(self, match: int, most: int) -> int:
        """How many tokens to guess on a match of this length; 0: better none."""
        right = self._right.get(match)
        if right is None or not self._step_s:
            return 0
        size = most if right >= _SMALL else min(_SMALL, most)
        if size not in self._batch_s and right < 1:
            return 0
        # A large batch costs what a small one does at least.
        cost = max((statistics.median(s) for n, s in self._batch_s.items() if n <= size), default=0.0)
        again_s = self._again_s / self._made if self._made else 0.0
        gain = (1 + right) * (statistics.median(self._step_s) - again_s)
        return size if gain > self._margin * cost else 0

    def stepped(self, seconds: float) -> None:
        """A token was run by itself."""
        self._step_s.append(seconds)
        self._age += 1
        if self._age >= self._forget:
            self._age, self._forget = 0, 2 * self._forget
            self._batch_s.clear()
            self._again_s, self._made = self._again_s / 2, self._made / 2

    def batched(self, size: int, seconds: float, right: int) -> None:
        """A batch of a guess of so many tokens was run, of which so many were right."""
        self._batch_s.setdefault(size, deque(maxlen=_RECENT)).append(seconds)
        self._made += 1 + right
        step_s = statistics.median(self._step_s) if self._step_s else seconds
        self._saved_s = _smooth(self._saved_s, (1 + right) * step_s - seconds)
        if self._saved_s < 0:
            self._margin, self._saved_s = 1.5 * self._margin, None
        else:
            self._margin = max(_MARGIN, 0.9 * self._margin)

    @property
    def steps_are_short(self) -> bool:
        """Whether there is nothing to be gained, however good the guesses."""
        return len(self._step_s) == _RECENT and statistics.median(self._step_s) < _WORTH_WATCHING_S

    def guessed(self, match: int, right: int) -> None:
        """Of a guess so many tokens were right."""
        self._right[match] = _smooth(self._right.get(match), right)

    def ran_again(self, seconds: float) -> None:
        """Tokens of batches were run again, one by one."""
        self._again_s += seconds
        self._saved_s = _smooth(self._saved_s, -seconds)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + _NEW_SHARE * (new - old)


@dataclass
class Counts:
    """What happened: steps asked for, single runs, batches, tokens guessed, those that were right,
    and those that were run again."""

    steps: int = 0
    singles: int = 0
    batches: int = 0
    guessed: int = 0
    right: int = 0
    again: int = 0


@dataclass
class _Guess:
    """Tokens that may come, of which `right` came; with logits where a batch was run, and its seconds."""

    tokens: list[int]
    match: int
    rows: Logits | None = None
    seconds: float = 0.0
    right: int = 0

    def takes(self, token: int) -> bool:
        """Whether the next token is as guessed; counts it."""
        if self.right < len(self.tokens) and self.tokens[self.right] == token:
            self.right += 1
            return True
        return False


class LookupSession:
    """A session on a session; see `runtimes.base.Session`. Only `step` is other than the one below.

    `most` tokens are guessed at once; `adaptive`: fewer where few were right, none where it does not pay.
    """

    def __init__(
        self,
        session: Session,
        most: int = MOST,
        adaptive: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.below, self.counts = session, Counts()
        self.context, self.vocab_size = session.context, session.vocab_size
        self._history = History()
        self._most, self._adaptive, self._clock = most, adaptive, clock
        self._worth, self._greedy = Worth(), True
        self._guess: _Guess | None = None
        self._clean = 0  # so many positions of the cache are as single steps make them
        self._plain = False  # nothing is watched any more: steps are too short to be worth it
        session.reset()

    @property
    def length(self) -> int:
        """Tokens that were appended; below may be guesses behind them, or fewer after an interrupt."""
        return min(self._appended, self.below.length)

    @property
    def _appended(self) -> int:
        """Tokens that were appended."""
        return len(self._history.tokens)

    def expect(self, greedy: bool) -> None:
        """Whether the tokens to come are the likeliest ones; nothing else is guessed."""
        self._greedy = greedy

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append tokens; logits (vocab,) after the last. What an answer is compared with begins anew here."""
        self._settle()
        logits = self.below.prefill(tokens)
        self._history.append(tokens)
        self._clean = self._appended
        return logits

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        """Append tokens; logits after each of `tokens[start:]` in chunks."""
        self._settle()
        rows = self.below.score(tokens, start)
        self._history.append(tokens)
        self._clean = self._appended
        return rows

    def step(self, token: int) -> Logits:
        """Append one token; logits (vocab,) after it, from a batch that guessed it where there is one."""
        self.counts.steps += 1
        if self._plain:
            return self._unwatched(token)
        guess = self._guess
        if guess is not None and guess.takes(token):
            if guess.rows is not None:
                self.counts.right += 1
                self._history.append((token,))
                return self._certain(guess.rows[guess.right])
            # Nobody ran it: it is only watched.
            return self._certain(self._single(token))
        self._settle()
        return self._certain(self._batch(token) if self._greedy else self._single(token))

    def truncate(self, length: int) -> None:
        """Keep only the first `length` tokens."""
        self._settle()
        self.below.truncate(length)
        self._history.truncate(max(0, min(length, self.length)))
        self._clean = min(self._clean, self._appended)

    def reset(self) -> None:
        """Empty the cache."""
        self.truncate(0)

    def close(self) -> None:
        """Free the model."""
        self.below.close()

    def _single(self, token: int) -> Logits:
        """Run a token by itself."""
        start, clean = self._clock(), self._clean == self._appended
        logits = self.below.step(token)
        self._worth.stepped(self._clock() - start)
        self._history.append((token,))
        self._clean += clean
        self.counts.singles += 1
        if self._adaptive and clean and self._worth.steps_are_short:
            self._plain, self._guess = True, None
            self._history.stop_watching()
        return logits

    def _unwatched(self, token: int) -> Logits:
        """Run a token as if there were no guessing at all."""
        logits = self.below.step(token)
        self._history.append((token,))
        self.counts.singles += 1
        return logits

    def _batch(self, token: int) -> Logits:
        """Run a token, and what is likely to follow it where that pays; the logits after the token."""
        self._history.append((token,))
        match, guess = self._history.guess(min(self._most, self.context - self._appended))
        size = self._most if not self._adaptive else self._worth.size(match, self._most)
        self._history.truncate(self._appended - 1)
        if not guess or not size:
            logits = self._single(token)
            self._guess = _Guess(guess, match) if guess and not self._plain else None
            return logits
        tokens = guess[:size]
        start = self._clock()
        rows = np.concatenate(list(self.below.score([token, *tokens])))
        self._history.append((token,))
        self._guess = _Guess(tokens, match, rows, self._clock() - start)
        self.counts.batches += 1
        self.counts.guessed += len(tokens)
        return rows[0]

    def _certain(self, logits: Logits) -> Logits:
        """Logits from which the likeliest token can be taken: the same, or those that single steps give."""
        if self._clean == self._appended or _leads(logits):
            return logits.copy()
        self._settle()
        start = self._clock()
        tokens = self._history.tokens[self._clean :]
        self.below.truncate(self._clean)
        for token in tokens:
            logits = self.below.step(token)
        self._clean = self._appended
        self._worth.ran_again(self._clock() - start)
        self.counts.again += len(tokens)
        return logits

    def _settle(self) -> None:
        """Be done with a guess: give up what was wrong, and learn from it."""
        guess, self._guess = self._guess, None
        # What an interrupt kept from being run was never appended.
        self._history.truncate(self.length)
        if guess is None:
            return
        self._worth.guessed(guess.match, guess.right)
        if guess.rows is not None:
            self._worth.batched(len(guess.tokens), guess.seconds, guess.right)
            self.below.truncate(self._appended)


def _leads(logits: Logits) -> bool:
    """Whether the best logit is ahead of the second by more than rounding could change."""
    best = int(logits.argmax())
    second = max(logits[:best].max(initial=-np.inf), logits[best + 1 :].max(initial=-np.inf))
    return bool(logits[best] - second > GUARD * logits.std())
