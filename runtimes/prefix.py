"""Running a prompt from where it differs from what the session already holds.

Chats repeat their history, evaluations their worked examples: the longest common prefix of tokens stays in
the KV cache. Knows sessions and tokens; not text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from runtimes.base import Session, SharingSession
from runtimes.generate import Constraint, Generation, generate
from runtimes.sampling import GREEDY, Sampling


class PrefixCache:
    """The only user of a session; remembers the tokens that are in its cache.

    `prompt_tokens`, of the last prompt, and `reused_tokens`, how many of them needed no run.

    Kernels round differently when a prompt is cut elsewhere. With a `step` above 1, prompts that part ways
    are reused up to a multiple of it only: run in parts of `step` tokens, a prompt then has the same bits
    whatever was in the cache. A conversation that goes on after its own answer is reused to the last token.
    """

    def __init__(self, session: Session, step: int = 1) -> None:
        self.session, self.step = session, step
        self.prompt_tokens = self.reused_tokens = 0
        self._prompt: list[int] = []
        self._asked = 0  # how many of the tokens were asked for; the others are an answer
        self._generation: Generation | None = None
        session.reset()

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] = (),
        max_tokens: int | None = None,
        rng: np.random.Generator | None = None,
        *,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ) -> Generation:
        """Go on from `prompt`, a whole text; see `generate`. The generation before it must be done with.

        Raises ContextOverflowError when the prompt does not fit.
        """
        shared = self.shared(prompt)
        self.session.truncate(shared)
        self._prompt, self._generation = list(prompt[:shared]), None
        generation = generate(
            self.session,
            prompt[shared:],
            sampling,
            stop_ids,
            max_tokens,
            rng,
            constraint=constraint,
            logprobs=logprobs,
            history=prompt[:shared],
        )
        self._prompt, self._generation, self._asked = list(prompt), generation, len(prompt)
        self.prompt_tokens, self.reused_tokens = len(prompt), shared
        return generation

    def shared(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of a prompt need no run; at least one must: logits come from running."""
        held = self.held()
        shared = max(0, min(_common_prefix(held, prompt), len(prompt) - 1))
        return shared if self._asked < shared else shared - shared % self.step

    def adopt(self, other: PrefixCache, length: int) -> None:
        """Hold the first `length` tokens that another cache holds, copied; both sessions share one model."""
        assert isinstance(self.session, SharingSession) and isinstance(other.session, SharingSession)
        tokens = other.held()[:length]
        self.session.copy_prefix(other.session, len(tokens))
        self._prompt, self._generation, self._asked = tokens, None, other._asked

    def reset(self) -> None:
        """Empty the cache."""
        self.session.reset()
        self._prompt, self._generation = [], None

    def held(self) -> list[int]:
        """The tokens in the cache: a generation may have been left at any point."""
        made = self._generation.tokens if self._generation is not None else []
        return (self._prompt + made)[: self.session.length]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens the two share."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
