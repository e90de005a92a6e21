"""A tokenizer of single characters, and a model that says what a script says; alone, or in one pass."""

from __future__ import annotations

import numpy as np

from runtimes.sampling import choose


class Speller:
    """A tokenizer of single characters; id 0 ends."""

    stop_ids = frozenset({0})

    def encode(self, text, bos=False, special=False):
        return [1] * bos + [ord(c) for c in text]

    def encode_chat(self, messages):
        return self.encode("".join(m["content"] for m in messages), bos=True)

    def stream(self):
        class Stream:
            def push(self, id):
                return chr(id)

            def flush(self):
                return ""

        return Stream()


class Scripted:
    """After a prompt, spells out what the script says for its last character; counts tokens run."""

    vocab_size = 128

    def __init__(self, script: dict[str, str], context: int = 200) -> None:
        self.script, self.context = script, context
        self.cache: list[int] = []
        self.ran = 0

    @property
    def length(self):
        return len(self.cache)

    def prefill(self, tokens):
        self.cache += tokens
        self.ran += len(tokens)
        said = self.script.get(chr(self.cache[-1]), "") + "\0"
        self.said = iter(said)
        return self._next()

    def step(self, token):
        self.cache.append(token)
        return self._next()

    def _next(self):
        logits = np.zeros(128, np.float32)
        logits[ord(next(self.said))] = 9
        return logits

    def truncate(self, length):
        del self.cache[length:]

    def reset(self):
        self.cache.clear()


class Pass(Scripted):
    """Conversations that step together: `passes` are the numbers of those in each pass, `copies` the tokens
    that were copied, `opened` and `closed` the conversations beside the first; common to all."""

    prefill_chunk = 64

    def __init__(self, script, context=200, first=None):
        super().__init__(script, context)
        self.first = first or self
        if first is None:
            self.passes, self.copies, self.opened, self.closed, self.total = [], [], 0, 0, 0

    def prefill(self, tokens):
        self.first.total += len(tokens)
        return super().prefill(tokens)

    def prefill_choose(self, tokens, choice):
        return choose(self.prefill(tokens), choice)

    def step_many(self, conversations, tokens, choices=None):
        self.first.passes.append(len(tokens))
        assert len({id(each) for each in conversations}) == len(tokens)
        rows = [each.step(token) for each, token in zip(conversations, tokens, strict=True)]
        return [choose(row, choice) for row, choice in zip(rows, choices, strict=True)]

    def another(self):
        self.first.opened += 1
        return Pass(self.script, self.context, self.first)

    def copy_prefix(self, source, length):
        assert source is not self and source.first is self.first and len(source.cache) >= length
        self.first.copies.append(length)
        self.cache = source.cache[:length]

    def score(self, tokens, start=0):
        raise NotImplementedError

    def close(self):
        self.first.closed += 1
