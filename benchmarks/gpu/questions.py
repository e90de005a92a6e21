"""Questions per second of a batched evaluation in GSM8K's form, and of one question after the other.

Questions and worked examples are made up (fox_edge.nano.problems), five examples before each, shared by all
and read once. A random model's answers are as long as they may be, so the rate is of answers of that length;
GSM8K's own are mostly shorter. Knows the evaluation's own loop; not how sessions are batched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks.accuracy import gsm8k
from benchmarks.accuracy.answer import answer_all, encode
from benchmarks.common.subject import open_subject
from benchmarks.devices.card import own_peak_bytes
from fox_edge.nano.problems import generate
from runtimes.base import SessionOptions

_SHOTS, _SEED = 5, 17


def questions_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """{subject, device, questions, at_once, max_tokens} -> questions and tokens per second."""
    subject = open_subject(job["subject"])
    tokenizer, count, at_once = subject.tokenizer(), job["questions"], job["at_once"]
    made = [gsm8k.Question(p.question, p.answer) for p in generate(_SEED, _SHOTS + count)]
    examples, asked = made[:_SHOTS], made[_SHOTS:]
    prompts = [gsm8k.prompt(examples, one.question) for one in asked]
    longest = max(len(encode(tokenizer, prompt)) for prompt in prompts)
    context = min(longest + job["max_tokens"], subject.context)
    options = SessionOptions(context=context, conversations=at_once, device=job["device"])
    with contextlib.closing(subject.open_session(options)) as session:
        done = 0

        def keep(_place: int, _answer: Any) -> None:
            nonlocal done
            done += 1
            progress(done, count)

        shared = gsm8k.worked(examples)
        warm = prompts[: min(len(prompts), at_once)]
        answer_all(session, tokenizer, warm, 4, (), shared=shared, at_once=at_once)
        start = time.perf_counter()
        answers = answer_all(
            session, tokenizer, prompts, job["max_tokens"], (), keep, shared=shared, at_once=at_once
        )
        seconds = time.perf_counter() - start
    tokens = sum(answer.answer_tokens for answer in answers)
    return {
        "questions": count,
        "at_once": at_once,
        "max_tokens": job["max_tokens"],
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "reused_prompt_tokens": sum(answer.reused_tokens for answer in answers),
        "answer_tokens": tokens,
        "seconds": seconds,
        "questions_per_s": count / seconds,
        "answer_tokens_per_s": tokens / seconds,
        "peak_device_bytes": own_peak_bytes(),
    }
