"""A session that moves a clock by known times instead of computing, and notes what it was given."""

import itertools

import numpy as np

from runtimes.sampling import choose


class Clock:
    """Seconds that pass only when someone works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeSession:
    """`token_s` for a token of a prompt, `steps_s` for each step in turn; others that share are the same."""

    context, vocab_size = 100_000, 8

    def __init__(self, clock, token_s=0.01, steps_s=(0.1,), log=None, name=0) -> None:
        self.clock, self.token_s, self.steps_s = clock, token_s, steps_s
        self.log = [] if log is None else log
        self.name, self.length, self.others = name, 0, 0
        self._steps = itertools.cycle(steps_s)

    def prefill(self, tokens):
        self.clock.now += self.token_s * len(tokens)
        self.length += len(tokens)
        self.log.append((self.name, "prefill", len(tokens)))
        return np.eye(8, dtype=np.float32)[self.length % 8]

    def step(self, token):
        self.clock.now += next(self._steps)
        self.length += 1
        self.log.append((self.name, "step", token))
        return np.eye(8, dtype=np.float32)[self.length % 8]

    def score(self, tokens, start=0):
        raise AssertionError("nothing here asks for scores")

    def truncate(self, length):
        self.length = min(self.length, length)

    def reset(self):
        self.length = 0

    def close(self):
        self.log.append((self.name, "close", 0))

    def another(self):
        self.others += 1
        return FakeSession(self.clock, self.token_s, self.steps_s, self.log, self.others)

    def copy_prefix(self, source, length):
        raise AssertionError("users share no prefix here")


class BatchingSession(FakeSession):
    """A pass for several takes `pass_s`, however many they are."""

    prefill_chunk = 32
    pass_s = 0.1

    def prefill_choose(self, tokens, choice):
        return choose(self.prefill(tokens), choice)

    def step_many(self, conversations, tokens, choices=None):
        self.clock.now += self.pass_s
        self.log.append((self.name, "pass", tuple(conversation.name for conversation in conversations)))
        for conversation in conversations:
            conversation.length += 1
        return [choose(np.eye(8, dtype=np.float32)[c.length % 8], choices[0]) for c in conversations]

    def another(self):
        self.others += 1
        return BatchingSession(self.clock, self.token_s, self.steps_s, self.log, self.others)
