"""Answers that grow token by token, each from the place where what all prompts begin with ends.

Knows sessions, a tokenizer's stream and when an answer is over; not whose turn it is, nor what is right.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtimes.base import Session, SharingSession
from runtimes.generate import Generation, generate, run_together

if TYPE_CHECKING:
    from fox_edge.tokenizer import Tokenizer

# A final line in GSM8K's form, complete: nothing after it can change the answer that is read.
_FINAL_LINE = re.compile(r"#### [^\n]*\n")


class SharedStart:
    """A session whose cache keeps the tokens that prompts begin with; `reused`: so many of the last one's.

    `others` are conversations on the same weights: what one of them has of the start is copied, not run.
    """

    def __init__(self, session: Session, start: Sequence[int], others: Sequence[SharedStart] = ()) -> None:
        self.session, self.start, self.others = session, list(start), others
        self.reused = 0
        self._holds = False
        session.reset()

    def begin(self, prompt: Sequence[int], stop_ids: frozenset[int], max_tokens: int) -> Generation:
        """Go on from a prompt, whole; the generation before it must be done with.

        The start is a run of its own even in front of the first prompt, so that all are cut at one place. A
        prompt that begins otherwise (its first question merged with the start's end) is run whole.
        """
        length = len(self.start)
        fits = 0 < length < len(prompt) and list(prompt[:length]) == self.start
        if fits:
            self.reused = length if self._find_start() else 0
        else:
            self.reused = length = 0
            self.session.reset()
        self._holds = fits
        return generate(
            self.session,
            prompt[length:],
            stop_ids=stop_ids,
            max_tokens=max_tokens,
            history=prompt[:length],
        )

    def _find_start(self) -> bool:
        """Hold the start and nothing else; whether it was there already, here or in another conversation."""
        source = next((other for other in self.others if other._holds), None)
        if self._holds:
            self.session.truncate(len(self.start))
        elif source is not None:
            assert isinstance(self.session, SharingSession) and isinstance(source.session, SharingSession)
            self.session.copy_prefix(source.session, len(self.start))
        else:
            self.session.reset()
            self.session.prefill(self.start)
            return False
        return True


class Writing:
    """An answer that is being written: its prompt has been run, and its first token is there.

    `over`: nothing comes any more. `cut`: neither the model nor a stop text ended it, but a limit did.
    """

    def __init__(
        self,
        place: int,
        cache: SharedStart,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        max_tokens: int,
        stop_texts: Sequence[str],
    ) -> None:
        began = time.perf_counter()
        self.place, self.prompt_tokens, self.text = place, len(prompt), ""
        self.generation = cache.begin(prompt, tokenizer.stop_ids, max_tokens)
        self.reused_tokens = cache.reused
        self._stream, self._stop_texts = tokenizer.stream(), stop_texts
        self.over = self._ended = False
        self.take(next(self.generation, None))
        self.first_token_s = self.seconds = time.perf_counter() - began

    @property
    def cut(self) -> bool:
        """Whether it was over before it was at its end."""
        return not self._ended and self.generation.finish_reason != "stop"

    def take(self, token: int | None) -> None:
        """One more token; None: there is none."""
        if token is None:
            self.text += self._stream.flush()
            self.over = True
            return
        self.text += self._stream.push(token)
        self.text, self._ended = _cut_at_end(self.text, self._stop_texts)
        self.over = self._ended


def advance(writings: Sequence[Writing]) -> None:
    """One more token of each, in one pass where there are several; its time is shared out among them."""
    began = time.perf_counter()
    results = run_together([one.generation for one in writings])
    for one in writings:
        generation = one.generation
        one.take(generation.take(results[generation]) if generation in results else next(generation, None))
    share = (time.perf_counter() - began) / max(1, len(writings))
    for one in writings:
        one.seconds += share


def _cut_at_end(text: str, stop_texts: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop text or the end of its final line, and whether there was one."""
    found = [at for stop in stop_texts if (at := text.find(stop)) >= 0]
    if final := _FINAL_LINE.search(text):
        found.append(final.end())
    return (text[: min(found)], True) if found else (text, False)
