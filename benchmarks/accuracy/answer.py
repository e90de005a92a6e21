"""Letting a subject answer prompts, greedily, in a process of its own.

Knows sessions, tokenizers and when an answer is over; not what is right. Worked examples that prompts share
are run once, and every prompt goes on from that very place: an answer then has the same bits whichever
prompts came before it, so that a run may be cut off and gone on with, or dealt out in parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.answers_log import appending
from benchmarks.accuracy.gsm8k import judge
from benchmarks.common.subject import open_subject
from fox_edge.errors import ContextOverflowError
from runtimes.base import Session, SessionOptions
from runtimes.generate import Generation, generate

if TYPE_CHECKING:
    from fox_edge.tokenizer import Tokenizer

# A plain text, or a chat's messages.
Prompt = str | list[dict[str, str]]

# A final line in GSM8K's form, complete: nothing after it can change the answer that is read.
_FINAL_LINE = re.compile(r"#### [^\n]*\n")


@dataclass(frozen=True)
class Answer:
    """What a subject said. `cut`: neither it nor a stop text ended the answer, but a limit did.

    `first_token_s` is the time until the prompt had been run, `seconds` that of the whole answer.
    """

    text: str
    cut: bool
    prompt_tokens: int
    reused_tokens: int
    answer_tokens: int
    first_token_s: float
    seconds: float


def answer_all(
    session: Session,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_tokens: int,
    stop_texts: Sequence[str] = (),
    keep: Callable[[int, Answer], None] = lambda place, answer: None,
    shared: str = "",
) -> list[Answer]:
    """Answer each prompt greedily; raises ContextOverflowError before the first when one does not fit.

    `shared` is the text that all prompts begin with: it is run once. `keep` is told every answer when it is
    there, with its place among the prompts.
    """
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, encoded), default=0)
    if longest >= session.context:
        raise ContextOverflowError(
            f"the longest prompt has {longest} tokens; with its answer it does not fit a context of "
            f"{session.context}"
        )
    # The last token of the shared text may be another one when a question follows.
    cache, answers = SharedStart(session, tokenizer.encode(shared, bos=True)[:-1] if shared else []), []
    for place, tokens in enumerate(encoded):
        answers.append(_answer(cache, tokenizer, tokens, max_tokens, stop_texts))
        keep(place, answers[-1])
    return answers


class SharedStart:
    """A session whose cache keeps the tokens that prompts begin with; `reused`: so many of the last one's."""

    def __init__(self, session: Session, start: Sequence[int]) -> None:
        self.session, self.start = session, list(start)
        self.reused = 0
        self._ran = False
        session.reset()

    def begin(self, prompt: Sequence[int], stop_ids: frozenset[int], max_tokens: int) -> Generation:
        """Go on from a prompt, whole; the generation before it must be done with.

        The start is a run of its own even in front of the first prompt, so that all are cut at one place. A
        prompt that begins otherwise (its first question merged with the start's end) is run whole.
        """
        length = len(self.start)
        fits = 0 < length < len(prompt) and list(prompt[:length]) == self.start
        self.reused = length if fits and self._ran else 0
        if not fits:
            self.session.reset()
            length = 0
        elif self._ran:
            self.session.truncate(length)
        else:
            self.session.reset()
            self.session.prefill(self.start)
        self._ran = fits
        return generate(
            self.session,
            prompt[length:],
            stop_ids=stop_ids,
            max_tokens=max_tokens,
            history=prompt[:length],
        )


def encode(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """A prompt's tokens: a text after <bos>, messages through the chat template."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, bos=True)
    return tokenizer.encode_chat(prompt)


def _answer(
    cache: SharedStart, tokenizer: Tokenizer, tokens: list[int], max_tokens: int, stop_texts: Sequence[str]
) -> Answer:
    start = time.perf_counter()
    generation = cache.begin(tokens, tokenizer.stop_ids, max_tokens)
    stream, text, ended = tokenizer.stream(), "", False
    first_token_s = 0.0
    for token in generation:
        first_token_s = first_token_s or time.perf_counter() - start
        text += stream.push(token)
        text, ended = _cut_at_end(text, stop_texts)
        if ended:
            break
    else:
        text += stream.flush()
    seconds = time.perf_counter() - start
    return Answer(
        text=text,
        cut=not ended and generation.finish_reason != "stop",
        prompt_tokens=len(tokens),
        reused_tokens=cache.reused,
        answer_tokens=len(generation.tokens),
        first_token_s=first_token_s or seconds,
        seconds=seconds,
    )


def _cut_at_end(text: str, stop_texts: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop text or the end of its final line, and whether there was one."""
    found = [at for stop in stop_texts if (at := text.find(stop)) >= 0]
    if final := _FINAL_LINE.search(text):
        found.append(final.end())
    return (text[: min(found)], True) if found else (text, False)


def prompt_digest(prompt: Prompt) -> str:
    """SHA-256 of a prompt, as answers in a file carry it."""
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()


def run_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'answer': {subject, threads, session, prompts, max_tokens, stop_texts} -> answers.

    Where there are any: `shared`, the text that all prompts begin with; `skip`, places of prompts that have
    been answered; `context_for`, prompts that must fit too (those of other parts of one task); `ids` and
    `expected`, one per prompt, and `log`, the file that every answer is added to at once. The context is as
    long as the longest prompt and its answer need, at most the model's.
    """
    prompts = job["prompts"]
    subject = open_subject(job["subject"])
    tokenizer = subject.tokenizer()
    longest = max(len(encode(tokenizer, prompt)) for prompt in [*prompts, *job.get("context_for", ())])
    context = min(longest + job["max_tokens"], subject.context)
    options = SessionOptions(context=context, threads=job["threads"], **job.get("session", {}))
    places = sorted(set(range(len(prompts))) - set(job.get("skip", ())))
    path = Path(job["log"]) if job.get("log") else None
    with contextlib.closing(subject.open_session(options)) as session, appending(path, subject.spec) as write:

        def keep(n: int, answer: Answer) -> None:
            if path is not None:
                place = places[n]
                digest = {"prompt_sha256": prompt_digest(prompts[place])}
                judged = judge(answer.text, job["expected"][place])
                write(job["ids"][place], {**digest, **judged, **asdict(answer)})
            progress(len(prompts) - len(places) + n + 1, len(prompts))

        start = time.perf_counter()
        pending = [prompts[place] for place in places]
        shared = job.get("shared", "")
        answers = answer_all(session, tokenizer, pending, job["max_tokens"], job["stop_texts"], keep, shared)
        seconds = time.perf_counter() - start
    return {"answers": [asdict(answer) for answer in answers], "seconds": seconds}
