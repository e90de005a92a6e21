"""The clockwork of one measurement: load, first token, prompt speed, decode speed, memory.

Runs inside a process of its own (worker.py) on one subject. Knows sessions; not other artifacts, rounds or
ceilings. Token choice is greedy and counted in, as it is for a user.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.machine import memory
from benchmarks.subject import open_subject
from runtimes.base import Session, SessionOptions
from runtimes.generate import GREEDY, pick

# A small model is through in milliseconds: passes are repeated until this much time was measured.
MEASURE_S = 0.5
MAX_PASSES = 20
_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Timing:
    """One pass: a prompt, then tokens one at a time."""

    time_to_first_token_s: float
    prompt_tokens_per_s: float
    decode_tokens_per_s: float


def time_pass(session: Session, prompt: Sequence[int], decode_tokens: int) -> Timing:
    """Run a prompt in an empty cache and decode `decode_tokens` after the first token."""
    rng = GREEDY.rng()
    session.reset()
    start = time.perf_counter()
    logits = session.prefill(prompt)
    prompt_s = time.perf_counter() - start
    token = pick(logits, GREEDY, rng)
    first = time.perf_counter()
    for _ in range(decode_tokens):
        token = pick(session.step(token), GREEDY, rng)
    decode_s = time.perf_counter() - first
    return Timing(first - start, len(prompt) / prompt_s, decode_tokens / decode_s)


def measure(session: Session, prompt: Sequence[int], decode_tokens: int) -> dict[str, Any]:
    """Warm up, then the median of as many passes as fit MEASURE_S (at least one).

    `cold_time_to_first_token_s` is the warm-up's: what the very first question costs.
    """
    cold = time_pass(session, prompt, min(_WARM_UP_STEPS, decode_tokens))
    passes: list[Timing] = []
    deadline = time.perf_counter() + MEASURE_S
    while not passes or (time.perf_counter() < deadline and len(passes) < MAX_PASSES):
        passes.append(time_pass(session, prompt, decode_tokens))
    medians = {key: statistics.median(getattr(p, key) for p in passes) for key in asdict(cold)}
    return {**medians, "cold_time_to_first_token_s": cold.time_to_first_token_s, "passes": len(passes)}


def run_job(job: dict[str, Any], _progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'measure': {subject, threads, context, session, prompt, decode_tokens} -> figures."""
    subject = open_subject(job["subject"])
    subject.prepare()
    before = memory()
    start = time.perf_counter()
    options = SessionOptions(context=job["context"], threads=job["threads"], **job.get("session", {}))
    session = subject.open_session(options)
    load_s = time.perf_counter() - start
    figures = measure(session, job["prompt"], job["decode_tokens"])
    after = memory()
    session.close()
    return {
        "load_s": load_s,
        **figures,
        "peak_rss_bytes": after.peak_rss,
        "anonymous_rss_bytes": after.anonymous,
        "file_rss_bytes": after.file,
        "empty_rss_bytes": before.rss,
    }
