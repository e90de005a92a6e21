"""Letting a subject answer prompts, greedily, in a process of its own.

Knows sessions, tokenizers and when an answer is over; not what is right. Worked examples that prompts share
are run once: the KV cache keeps the longest common prefix from one prompt to the next.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.subject import open_subject
from fox_edge.errors import ContextOverflowError
from runtimes.base import Session, SessionOptions
from runtimes.prefix import PrefixCache

if TYPE_CHECKING:
    from fox_edge.tokenizer import Tokenizer

# A plain text, or a chat's messages.
Prompt = str | list[dict[str, str]]

# A final line in GSM8K's form, complete: nothing after it can change the answer that is read.
_FINAL_LINE = re.compile(r"#### [^\n]*\n")


@dataclass(frozen=True)
class Answer:
    """What a subject said. `cut`: neither it nor a stop text ended the answer, but a limit did."""

    text: str
    cut: bool
    prompt_tokens: int
    reused_tokens: int


def answer_all(
    session: Session,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_tokens: int,
    stop_texts: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Answer each prompt greedily; raises ContextOverflowError before the first when one does not fit."""
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, encoded), default=0)
    if longest >= session.context:
        raise ContextOverflowError(
            f"the longest prompt has {longest} tokens; with its answer it does not fit a context of "
            f"{session.context}"
        )
    cache, answers = PrefixCache(session), []
    for tokens in encoded:
        answers.append(_answer(cache, tokenizer, tokens, max_tokens, stop_texts))
        progress(len(answers), len(encoded))
    return answers


def encode(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """A prompt's tokens: a text after <bos>, messages through the chat template."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, bos=True)
    return tokenizer.encode_chat(prompt)


def _answer(
    cache: PrefixCache, tokenizer: Tokenizer, tokens: list[int], max_tokens: int, stop_texts: Sequence[str]
) -> Answer:
    generation = cache.generate(tokens, stop_ids=tokenizer.stop_ids, max_tokens=max_tokens)
    stream, text, ended = tokenizer.stream(), "", False
    for token in generation:
        text += stream.push(token)
        text, ended = _cut_at_end(text, stop_texts)
        if ended:
            break
    else:
        text += stream.flush()
    cut = not ended and generation.finish_reason != "stop"
    return Answer(text, cut, cache.prompt_tokens, cache.reused_tokens)


def _cut_at_end(text: str, stop_texts: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop text or the end of its final line, and whether there was one."""
    found = [at for stop in stop_texts if (at := text.find(stop)) >= 0]
    if final := _FINAL_LINE.search(text):
        found.append(final.end())
    return (text[: min(found)], True) if found else (text, False)


def run_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'answer': {subject, threads, session, prompts, max_tokens, stop_texts} -> answers.

    The context is as long as the longest prompt and its answer need, at most the model's.
    """
    subject = open_subject(job["subject"])
    tokenizer = subject.tokenizer()
    longest = max(len(encode(tokenizer, prompt)) for prompt in job["prompts"])
    context = min(longest + job["max_tokens"], subject.context)
    options = SessionOptions(context=context, threads=job["threads"], **job.get("session", {}))
    with contextlib.closing(subject.open_session(options)) as session:
        start = time.perf_counter()
        answers = answer_all(
            session, tokenizer, job["prompts"], job["max_tokens"], job["stop_texts"], progress
        )
        seconds = time.perf_counter() - start
    return {"answers": [asdict(answer) for answer in answers], "seconds": seconds}
